"""Formats x orientations x modes x colour profiles, from the header (`probe`) to the pixels (`decode`)."""

import io
import struct
import zlib

import numpy as np
import pytest
from distill.core.data.samples.images import decode, probe
from PIL import Image, ImageCms
from support.icc import SRGB, cmyk_profile, encoded, grey_profile, meant, of_lab, rgb_profile
from test_data_images import encode, quadrants

ORIENTATION = 0x0112
STORED = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}
"""The transpositions by which a camera stores an upright image."""
MODES = {
    "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA", "L", "P"),
    "AVIF": ("RGB", "RGBA", "L", "P"),
}
OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True},
           "AVIF": {"quality": 95, "subsampling": "4:4:4"}}  # fmt: skip


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    grey = np.asarray(image.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    return image.convert(mode, dither=Image.Dither.NONE)


def upright(mode: str) -> np.ndarray:
    """The pixels that every orientation of :func:`quadrants` in this mode must give, (16, 24, 3)."""
    if mode == "1":
        return np.asarray(in_mode(quadrants(), "1").convert("RGB")).astype(int)
    grey = mode in ("L", "LA", "I;16", "I", "F")
    return np.asarray(quadrants().convert("L").convert("RGB") if grey else quadrants()).astype(int)


@pytest.mark.parametrize("where", ["exif", "xmp"])
@pytest.mark.parametrize("format", MODES)
def test_every_orientation_of_every_mode_is_upright_in_header_and_pixels(format, where):
    if format == "AVIF" and where == "xmp":
        pytest.skip("AVIF turns by properties of its own, which Pillow reports as EXIF")
    for mode in MODES[format]:
        for orientation, undo in STORED.items():
            stored = quadrants()
            for method in undo:
                stored = stored.transpose(Image.Transpose(method))
            options = dict(OPTIONS.get(format, {}))
            if where == "exif":
                options["exif"] = Image.Exif()
                options["exif"][ORIENTATION] = orientation
            else:
                options |= xmp(format, orientation)
            data = encode(in_mode(stored, mode), format, **options)
            case = (format, mode, orientation)
            assert probe(io.BytesIO(data)) == (24, 16), case
            image = decode(data)
            assert (image.mode, image.size) == ("RGB", (24, 16)), case
            off = np.abs(np.asarray(image).astype(int) - upright(mode))
            assert np.median(off) <= 2, case
            assert (off[[4, 4, 12, 12], [6, 18, 6, 18]] <= 6).all(), case


def xmp(format: str, orientation: int) -> dict:
    text = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    if format == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", text)
        return {"pnginfo": info}
    if format == "TIFF":
        from PIL.TiffImagePlugin import ImageFileDirectory_v2

        tags = ImageFileDirectory_v2()
        tags[700] = text.encode()
        tags.tagtype[700] = 1
        return {"tiffinfo": tags}
    return {"xmp": text.encode()}


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
def test_compressed_and_multi_page_tiffs_are_turned_once(compression):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = quadrants().transpose(Image.Transpose.ROTATE_90)
    pages = {"save_all": True, "append_images": [Image.new("RGB", (5, 5))]} if compression == "tiff_lzw" else {}
    data = encode(stored, "TIFF", exif=exif, compression=compression, **pages)
    assert probe(io.BytesIO(data)) == decode(data).size == (24, 16)
    assert (np.abs(np.asarray(decode(data)).astype(int) - upright("RGB"))[[4, 12], [6, 18]] <= 6).all()


# -- profiles ---------------------------------------------------------------------------------------------------------

GREEN = (40, 200, 60)
WIDE = rgb_profile()


def flat(mode: str, colour=GREEN, alpha: int = 255) -> Image.Image:
    if mode in ("RGBA", "LA"):
        image = Image.new("RGB", (8, 8), colour).convert("L" if mode == "LA" else "RGB")
        image.putalpha(alpha)
        return image
    return (
        Image.new("RGB", (8, 8), colour).quantize(4) if mode == "P" else Image.new("RGB", (8, 8), colour).convert(mode)
    )


def pixel(image: Image.Image, format: str, profile: bytes, **options) -> list[int]:
    data = encode(image, format, icc_profile=profile, **(OPTIONS.get(format, {}) | options))
    return np.asarray(decode(data))[4, 4].astype(int).tolist()


def close(found, wanted, by: int = 2) -> bool:
    return bool((np.abs(np.array(found) - np.array(wanted)) <= by).all())


@pytest.mark.parametrize("format", MODES)
def test_a_display_profile_is_used_in_every_mode(format):
    assert not close(meant(GREEN), GREEN, 20), "the profile means another colour"
    for mode in MODES[format]:
        if mode in ("RGB", "RGBA", "P", "YCbCr"):
            assert close(pixel(flat(mode), format, WIDE), meant(GREEN), 6 if format in ("JPEG", "AVIF") else 2), mode
        elif mode in ("L", "LA"):  # a profile of colours in a grey image, as many programs write it
            grey = flat("L").getpixel((0, 0))
            steep = rgb_profile(gamma=1.0)
            assert close(pixel(flat(mode), format, steep), meant([grey] * 3, gamma=1.0), 4), mode


def test_transparent_pixels_are_converted_before_they_are_laid_on_white():
    wanted = np.rint((meant(GREEN) * 100 + 255 * 155) / 255)
    assert close(pixel(flat("RGBA", alpha=100), "PNG", WIDE), wanted)
    assert close(pixel(flat("RGBA", alpha=100), "TIFF", WIDE), wanted)
    assert pixel(flat("RGBA", alpha=0), "PNG", WIDE) == [255] * 3
    palette = flat("P")
    assert close(pixel(palette, "PNG", WIDE, transparency=3), meant(GREEN))
    assert pixel(palette, "PNG", WIDE, transparency=int(np.asarray(palette)[4, 4])) == [255] * 3


def test_grey_profiles_are_used_in_grey_images_of_8_and_16_bits():
    linear, level = grey_profile(), 64
    wanted = encoded(np.array([level / 255] * 3))
    grey = Image.new("L", (8, 8), level)
    alpha = grey.copy()
    alpha.putalpha(255)
    deep = Image.fromarray(np.full((8, 8), level * 257, np.uint16))
    for image, format in ((grey, "PNG"), (grey, "TIFF"), (grey, "JPEG"), (alpha, "PNG"), (deep, "PNG"), (deep, "TIFF")):
        assert close(pixel(image, format, linear), wanted), (image.mode, format)


def test_printers_profiles_are_used_in_cmyk():
    lab = (150, 90, 170)
    profile = cmyk_profile({(1, 0, 1, 0): lab})
    for format in ("JPEG", "TIFF"):
        image = Image.new("CMYK", (8, 8), (255, 0, 255, 0))
        assert close(pixel(image, format, profile), of_lab(lab), 4), format
        assert close(pixel(Image.new("CMYK", (8, 8)), format, profile), [255] * 3, 2), format


def test_srgb_is_known_by_what_it_means_not_by_its_name():
    for profile in (rgb_profile(primaries=SRGB, gamma=1.0, name="sRGB linear"), rgb_profile(name="not sRGB at all")):
        gamma, primaries = (1.0, SRGB) if b"linear" in profile else (2.2, None)
        wanted = meant(GREEN, gamma=gamma, **({"primaries": primaries} if primaries else {}))
        assert close(pixel(flat("RGB"), "PNG", profile), wanted)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    named = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + b"sRGB"
    data = encode(noise, "PNG", icc_profile=named)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(noise)), "sRGB itself changes no pixel"


def test_profiles_that_are_broken_or_do_not_fit_leave_the_pixels_as_they_are():
    for profile in (b"x", b"\0" * 200, WIDE[:150], WIDE[:-60] + b"\0" * 20, cmyk_profile({}), b"sRGB"):
        for mode in ("RGB", "RGBA", "P"):
            assert pixel(flat(mode), "PNG", profile) == list(GREEN), (mode, profile[:20])
        grey = flat("L").getpixel((0, 0))
        assert pixel(flat("LA"), "PNG", profile) == [grey] * 3
    assert pixel(flat("RGB"), "PNG", grey_profile()) == list(GREEN)


def test_a_transparent_level_of_16_bits_is_white():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(colour_type: int, rows: np.ndarray, transparent: bytes) -> bytes:
        head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, colour_type, 0, 0, 0)
        data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
        body = chunk(b"IHDR", head) + chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(data))
        return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")

    grey = np.array([[1000, 30000], [65535, 1001]])
    found = np.asarray(decode(png(0, grey, struct.pack(">H", 1000))))
    assert found[..., 0].tolist() == [[255, 117], [255, 4]]
    colours = np.array([[[1000, 2000, 3000], [30000, 30000, 30000]]])
    found = np.asarray(decode(png(2, colours, struct.pack(">HHH", 1000, 2000, 3000))))
    assert found.tolist()[0][1] in ([117] * 3, [116] * 3)
    assert found.tolist()[0][0] == [255] * 3
