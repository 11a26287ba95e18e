"""A folder of files that people and the network do leave in datasets, and what must become of each."""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

EDGE = 32
SPARSE_BYTES = 600 * 2**20


def quadrants() -> Image.Image:
    """Red, green, blue, white: tells every orientation from every other."""
    pixels = np.zeros((EDGE, EDGE, 3), np.uint8)
    half = EDGE // 2
    pixels[:half, :half], pixels[:half, half:], pixels[half:, :half], pixels[half:, half:] = (
        (255, 0, 0), (0, 255, 0), (0, 0, 255), 255,
    )  # fmt: skip
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        key: What the report calls it.
        data: Its bytes; None where the folder gets it in another way.
        reason: Why it is quarantined, a regular expression; empty where it is used.
        like: The image that it must come out as.
        tolerance: Largest difference of a pixel's value (0-255).
        caption: Bytes of its caption file; None for none.
    """

    key: str
    data: bytes | None
    reason: str = ""
    like: Image.Image | None = None
    tolerance: int = 0
    caption: bytes | None = b"a caption"


def encode(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG by hand: `rows` as they are, each with its filter byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def deep_png(pixels: np.ndarray) -> bytes:
    """16 bits per channel."""
    levels = (pixels.astype(np.uint32) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    return png(pixels.shape[1], pixels.shape[0], 16, {3: 2, 4: 6}[pixels.shape[2]], rows)


def one_bit_png(edge: int) -> bytes:
    """A white image of many pixels in few bytes."""
    packer, rows = zlib.compressobj(9), []
    row = b"\0" + b"\xff" * -(-edge // 8)
    for start in range(0, edge, 512):
        rows.append(packer.compress(row * min(512, edge - start)))
    data = b"".join(rows) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(**tags: int) -> bytes:
    """A grey TIFF of 10x10 in which some tags say something else."""
    values = {"width": 10, "height": 10, "tile_width": 16, "tile_height": 16} | tags
    data = zlib.compress(bytes(256))
    entries = [
        (256, values["width"]), (257, values["height"]), (258, 8), (259, 8), (262, 1), (322, values["tile_width"]),
        (323, values["tile_height"]), (324, 8 + 2 + 12 * 9 + 4), (325, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, at) for tag, at in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + data


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


# -- what is used -----------------------------------------------------------------------------------------------------


def usable() -> Iterator[Case]:
    yield from odd_modes()
    yield from odd_metadata()
    yield from odd_names()
    yield from odd_captions()


def odd_modes() -> Iterator[Case]:
    image, white = quadrants(), Image.new("RGB", (EDGE, EDGE), "white")
    grey, ramp = image.convert("L"), np.linspace(0, 65535, EDGE * EDGE).astype(np.uint16).reshape(EDGE, EDGE)
    brightness = Image.fromarray(np.rint(ramp / 257).astype(np.uint8)).convert("RGB")
    other = image.transpose(Image.Transpose.ROTATE_180)
    alpha = np.dstack([np.asarray(image), np.full((EDGE, EDGE), 255, np.uint8)])
    alpha[EDGE // 2 :, EDGE // 2 :] = (9, 9, 9, 0)  # white, as nothing on white
    colours = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    files = {
        "cmyk.jpg": (encode(image.convert("CMYK"), "JPEG", quality=100, subsampling=0), image, 12),
        "cmyk.tif": (encode(image.convert("CMYK"), "TIFF"), image, 2),
        "grey16.png": (encode(Image.fromarray(ramp), "PNG"), brightness, 1),
        "grey16.tif": (encode(Image.fromarray(ramp), "TIFF"), brightness, 1),
        "rgb16.png": (deep_png(np.asarray(image)), image, 1),
        "rgba16.png": (deep_png(alpha), image, 1),
        "float.tif": (encode(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"), brightness, 1),
        "grey.jpg": (encode(grey, "JPEG", quality=100), grey.convert("RGB"), 8),
        "one-bit.png": (encode(white.convert("1"), "PNG"), white, 0),
        "palette.png": (encode(colours, "PNG"), image, 0),
        "palette-clear.png": (encode(colours, "PNG", transparency=bytes(256)), white, 0),
        "clear.png": (encode(Image.fromarray(alpha), "PNG"), image, 0),
        "clear-grey.png": (encode(Image.new("LA", (EDGE, EDGE), (0, 0)), "PNG"), white, 0),
        "clear.webp": (encode(Image.fromarray(alpha), "WEBP", lossless=True), image, 0),
        "moving.gif": (encode(image, "GIF", save_all=True, append_images=[other]), image, 0),
        "moving.webp": (encode(image, "WEBP", save_all=True, append_images=[other], lossless=True), image, 0),
        "moving.png": (encode(image, "PNG", save_all=True, append_images=[other]), image, 0),
        "progressive.jpg": (encode(image, "JPEG", progressive=True, quality=100, subsampling=0), image, 12),
        "whole.jp2": (encode(image, "JPEG2000"), image, 2),
        "whole.avif": (encode(image, "AVIF", quality=100, subsampling="4:4:4"), image, 24),
        "whole.ppm": (encode(image, "PPM"), image, 0),
        "UPPER.BMP": (encode(image, "BMP"), image, 0),
        "large.png": (one_bit_png(9_500), white, 0),
        "one-pixel.png": (encode(Image.new("RGB", (1, 1), "blue"), "PNG"), Image.new("RGB", (EDGE, EDGE), "blue"), 0),
        "strip.png": (encode(Image.new("RGB", (1, 300), "red"), "PNG"), Image.new("RGB", (8, 320), "red"), 0),
    }
    yield from (Case(key, data, like=like, tolerance=tolerance) for key, (data, like, tolerance) in files.items())


def odd_metadata() -> Iterator[Case]:
    image, plain = quadrants(), encode(quadrants(), "PNG")
    turned, unknown = Image.Exif(), Image.Exif()
    turned[0x0112], unknown[0x0112] = 6, 99
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    jpeg = {"quality": 100, "subsampling": 0}
    files = {
        "png-inside.jpg": (plain, 0),
        "turned.png": (encode(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned), 0),
        "turned-99.png": (encode(image, "PNG", exif=unknown), 0),
        "bad-exif.jpg": (encode(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage", **jpeg), 12),
        "cut-exif.jpg": (encode(image, "JPEG", exif=turned.tobytes()[:20], **jpeg), 12),
        "bad-icc.png": (encode(image, "PNG", icc_profile=b"no profile"), 0),
        "cut-icc.jpg": (encode(image, "JPEG", icc_profile=lab[:100], **jpeg), 12),
        "lab-icc.png": (encode(image, "PNG", icc_profile=lab), 0),
        "tail.png": (plain + b"\0" * 5000, 0),
        "tail.jpg": (encode(image, "JPEG", **jpeg) + b"PK\3\4 and an archive", 12),
    }
    yield from (Case(key, data, like=image, tolerance=tolerance) for key, (data, tolerance) in files.items())


ODD_NAMES = (
    "two\nlines.png", "carriage\rreturn.png", "tab\there.png", "\U0001f469\u200d\U0001f680 \U0001f98a.png",
    "it's \"quoted\".png", "-rf.png", "--help.png", " spaces .png", "%s {0} $(reboot);`x`.png", "red\x1b[31m.png",
    "\u202egnp.exe.png", "back\\slash.png", "caf\u00e9.png", "cafe\u0301.png", "n" * 251 + ".png", "a.b.c.png",
    "deep/er/and er/x.png", "folder.png/inside.png", "\u732b.png", "#%23?&=.png", "CON.png",
)  # fmt: skip


def odd_names() -> Iterator[Case]:
    for name in ODD_NAMES:
        yield Case(name, encode(quadrants(), "PNG"), like=quadrants())


def odd_captions() -> Iterator[Case]:
    captions = {
        "bom": b"\xef\xbb\xbfa caption",
        "utf16": "a caption".encode("utf-16"),
        "crlf": b"a caption\r\n\r\n",
        "emoji": "a \U0001f98a".encode(),
        "long": b"word " * 20_000,
    }
    for name, caption in captions.items():
        yield Case(f"caption-{name}.png", encode(quadrants(), "PNG"), like=quadrants(), caption=caption)


# -- what is quarantined ---------------------------------------------------------------------------------------------


def broken() -> Iterator[Case]:
    yield from not_images()
    yield from cut_short()
    yield from bombs()
    yield from bad_captions()


def not_images() -> Iterator[Case]:
    yield Case("zero.png", b"", "empty")
    yield Case("text.jpg", b"I am no image", "no image format")
    yield Case("page.jpg", b"<!doctype html><html>404</html>", "web page")
    yield Case("pointer.png", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer")
    heic = struct.pack(">I", 24) + b"ftypheic" + bytes(12) + bytes(200)
    yield Case("phone.heic", heic, "HEIC, for which there is no decoder")
    yield Case("phone.jpg", heic, "HEIC, for which there is no decoder")
    yield Case("new.jxl", b"\xff\x0a" + bytes(60), "JPEG XL")
    yield Case("next.avif", struct.pack(">I", 24) + b"ftypavif" + bytes(12) + bytes(200), "AVIF")
    yield Case("vector.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG")
    yield Case("paper.png", b"%PDF-1.7\n", "PDF")
    yield Case("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript")
    yield Case("archive.webp", b"PK\3\4" + bytes(90), "an archive")
    yield Case("noise.png", np.random.default_rng(0).bytes(999), "no image format")
    yield Case("nothing-in-it.png", png(0, 0, 8, 2, b""), r"\w")
    plain = encode(quadrants(), "PNG")
    yield Case("bits.png", patched(plain, len(plain) - 30, b"\xff" * 9), r"\w")
    yield Case("no-pixels.png", plain[:33] + chunk(b"IEND", b""), r"\w")


def cut_short() -> Iterator[Case]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8))
    formats = {
        "jpg": ("JPEG", {}), "progressive.jpg": ("JPEG", {"progressive": True}), "png": ("PNG", {}), "gif": ("GIF", {}),
        "webp": ("WEBP", {}), "tif": ("TIFF", {}), "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}), "bmp": ("BMP", {}),
        "ppm": ("PPM", {}), "jp2": ("JPEG2000", {}), "avif": ("AVIF", {}),
    }  # fmt: skip
    for suffix, (format, options) in formats.items():
        data = encode(noise, format, **options)
        for percent in (2, 40, 90):
            yield Case(f"cut-{percent}.{suffix}", data[: len(data) * percent // 100], r"\w")


def bombs() -> Iterator[Case]:
    plain, side = {name: encode(quadrants(), name) for name in ("BMP", "GIF", "JPEG", "JPEG2000")}, 60_000
    limit = "million pixels are not decoded"
    yield Case("bomb.png", png(side, side, 8, 2, bytes(5000)), limit)
    yield Case("bomb-whole.png", one_bit_png(20_000), limit)
    yield Case("bomb.bmp", patched(plain["BMP"], 18, struct.pack("<ii", side, side)), limit)
    yield Case("bomb.gif", patched(plain["GIF"], 6, struct.pack("<HH", 65_535, 65_535)), limit)
    frame = plain["JPEG"].index(b"\xff\xc0") + 5
    yield Case("bomb.jpg", patched(plain["JPEG"], frame, struct.pack(">HH", 65_500, 65_500)), limit)
    size = plain["JPEG2000"].index(b"ihdr") + 4
    yield Case("bomb.jp2", patched(plain["JPEG2000"], size, struct.pack(">II", side, side)), limit)
    yield Case("bomb.ppm", b"P6 100000 100000 255\n" + bytes(999), limit)
    webp = encode(quadrants(), "WEBP", lossless=True)
    yield Case("bomb.webp", patched(webp, 21, struct.pack("<I", 16_382 | 16_382 << 14)), limit)
    yield Case("bomb.tif", tiff(width=side, height=side), limit)
    yield Case("bomb-tiles.tif", tiff(tile_width=side, tile_height=side), limit)
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 * 2**20), 9))
    yield Case("bomb-text.png", png(1, 1, 8, 2, bytes(4), text), r"\w")
    yield Case("bomb-sparse.png", None, "more than 512 MiB")
    yield Case("line.png", png(60_000, 1, 8, 0, bytes(60_001)), "too long and narrow")


def bad_captions() -> Iterator[Case]:
    data = encode(quadrants(), "PNG")
    captions = {
        "latin": (b"caf\xe9", "not UTF-8"),
        "nul": (b"a cat\0and more", "NUL"),
        "utf16-bare": ("a cat".encode("utf-16-le"), "NUL"),
        "utf16-odd": "a cat".encode("utf-16")[:-1],
        "image": (data, "not UTF-8"),
        "gigantic": (b"word " * 500_000, "more than 1 MiB"),
        "empty": (b"", "no caption"),
        "spaces": (b" \n\t\r\n ", "no caption"),
        "bom-alone": (b"\xef\xbb\xbf", "no caption"),
        "missing": (None, "no caption"),
    }
    for name, found in captions.items():
        caption, reason = found if isinstance(found, tuple) else (found, "not UTF-16")
        yield Case(f"caption-{name}.png", data, reason, caption=caption)


# -- the folder -------------------------------------------------------------------------------------------------------


def special(folder: Path) -> Iterator[Case]:
    """Puts things that are no files into the folder, under names of images."""
    good = encode(quadrants(), "PNG")
    os.mkfifo(folder / "pipe.png")
    yield Case("pipe.png", None, "named pipe")
    os.mknod(folder / "socket.png", stat.S_IFSOCK | 0o600)
    yield Case("socket.png", None, "socket")
    for name, target, reason in (
        ("device.png", "/dev/zero", "device"), ("dangling.png", "nowhere.png", "link to nothing"),
        ("self.png", "self.png", "symbolic links"), ("ring-1.png", "ring-2.png", "symbolic links"),
        ("ring-2.png", "ring-1.png", "symbolic links"), ("process.png", "/proc/self/mem", "empty|Input/output"),
    ):  # fmt: skip
        (folder / name).symlink_to(target)
        yield Case(name, None, reason)
    for name in ("up", "deep/up", "deep/er/up"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder, target_is_directory=True)
    (folder / "empty.png").mkdir()
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "caption-pipe.png").write_bytes(good)
    os.mkfifo(folder / "caption-pipe.txt")
    yield Case("caption-pipe.png", None, "its caption file: it is a named pipe")
    (folder / "caption-lost.png").write_bytes(good)
    (folder / "caption-lost.txt").symlink_to("nowhere.txt")
    yield Case("caption-lost.png", None, "its caption file: it is a link to nothing")
    (folder / "linked.png").symlink_to(folder / "cmyk.tif")
    (folder / "linked.txt").write_text("a caption")
    yield Case("linked.png", None, like=quadrants(), tolerance=2)
    yield from nameless(folder, good)


def nameless(folder: Path, good: bytes) -> Iterator[Case]:
    """A name that is no UTF-8, where the file system lets there be one."""
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(good)
    except OSError:
        return
    yield Case("caf\\xe9.png", None, "no UTF-8")


def fill_hostile(folder: Path) -> dict[str, Case]:
    """Writes the folder; every case by its key."""
    cases = {case.key: case for case in (*usable(), *broken())}
    for case in cases.values():
        path = folder / case.key
        path.parent.mkdir(parents=True, exist_ok=True)
        if case.data is not None:
            path.write_bytes(case.data)
        if case.caption is not None:
            caption = path.with_suffix(".txt")
            caption.write_bytes(case.caption)
    with (folder / "bomb-sparse.png").open("wb") as stream:
        stream.write(encode(quadrants(), "PNG"))
        stream.truncate(SPARSE_BYTES)
    return cases | {case.key: case for case in special(folder)}
