"""Images of any kind come out upright, RGB and on white; broken ones are named."""

import io

import numpy as np
import pytest
from distill.core.data.samples.images import BrokenImage, decode, fit, probe, scale_and_crop
from PIL import Image, ImageCms


def encode(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def quadrants() -> Image.Image:
    """Red, green, blue, white: tells every orientation from every other."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12], pixels[:8, 12:], pixels[8:, :12], pixels[8:, 12:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    undo = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    # what a camera stores is the upright image under the inverse transposition
    stored = quadrants()
    for method in undo:
        stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "PNG", exif=exif)
    assert probe(io.BytesIO(data)) == (24, 16)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(quadrants()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_hide_good_pixels():
    data = encode(quadrants(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage", quality=95)
    assert probe(io.BytesIO(data)) == (24, 16)
    assert decode(data).size == (24, 16)


def test_transparency_is_blended_onto_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    assert np.asarray(decode(encode(clear, "PNG"))).min() == 255
    assert np.asarray(decode(encode(half, "PNG")))[0, 0].tolist() == [127] * 3
    assert np.asarray(decode(encode(palette, "PNG", transparency=1))).min() == 255
    assert np.asarray(decode(encode(palette, "PNG")))[0, 0].tolist() == [255, 0, 0]
    assert np.asarray(decode(encode(Image.new("RGB", (8, 8), (9, 9, 9)), "PNG", transparency=(9, 9, 9)))).min() == 255


def test_sixteen_bits_and_floats_keep_their_brightness():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.rint(ramp / 257).astype(int)
    for data in (encode(Image.fromarray(ramp), "PNG"), encode(Image.fromarray(ramp), "TIFF")):
        assert np.abs(np.asarray(decode(data))[..., 0].astype(int) - expected).max() <= 1
    floats = encode(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF")
    assert np.abs(np.asarray(decode(floats))[..., 0].astype(int) - expected).max() <= 1
    dark = encode(Image.fromarray(np.full((8, 8), 6553, np.uint16)), "PNG")
    assert np.asarray(decode(dark)).max() == 25 or np.asarray(decode(dark)).max() == 26  # not stretched to white


def test_images_of_all_modes_become_rgb():
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    for mode, format in (
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("YCbCr", "JPEG"),
        ("LAB", "TIFF"),
    ):
        source = red.convert("RGB" if mode == "LAB" else mode)
        if mode == "LAB":
            source = ImageCms.profileToProfile(
                red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            )
        image = decode(encode(source, format))
        assert image.mode == "RGB", mode
        if mode in ("CMYK", "YCbCr"):
            assert np.abs(np.asarray(image)[4, 4].astype(int) - (200, 30, 30)).max() < 12, (mode, format)
    gif = encode(red, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    assert np.asarray(decode(gif))[0, 0, 0] > 150  # the first frame


def test_broken_files_say_what_is_wrong():
    whole = encode(Image.effect_noise((64, 64), 60).convert("RGB"), "JPEG")
    png = bytearray(encode(quadrants(), "PNG"))
    png[16:24] = (60000).to_bytes(4, "big") * 2
    for data in (b"", b"hello", whole[: len(whole) // 2], b"\xff\xd8\xff" + bytes(100), bytes(png), b"GIF89a\x01"):
        with pytest.raises(BrokenImage, match=r"\w"):
            decode(data)
    with pytest.raises(BrokenImage):
        probe(io.BytesIO(b"nothing"))


def test_scaling_a_part_equals_scaling_all_and_cropping():
    x, y = np.meshgrid(np.linspace(0, 1, 90), np.linspace(0, 1, 60))
    smooth = Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))
    ours = scale_and_crop(smooth, size=(45, 30), left=7, top=3, bucket=(24, 16)).astype(int)
    whole = np.asarray(smooth.resize((45, 30), Image.Resampling.LANCZOS)).astype(int)[3:19, 7:31]
    assert np.abs(ours - whole).max() <= 3
    flipped = scale_and_crop(smooth, size=(45, 30), left=7, top=3, bucket=(24, 16), flip=True)
    assert np.array_equal(flipped[:, ::-1], ours)


def test_extreme_aspect_ratios_make_no_large_intermediate_image():
    thin = Image.new("RGB", (1, 30000), "red")
    assert fit(thin, 64, 64).shape == (64, 64, 3)
    assert (fit(Image.new("RGB", (1, 1), "red"), 8, 16) == (255, 0, 0)).all()


def test_an_image_of_the_buckets_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    out = scale_and_crop(Image.fromarray(pixels), size=(32, 32), left=0, top=0, bucket=(32, 32))
    assert np.array_equal(out, pixels)
