"""Decoding of images of any mode: upright, RGB on white, scaled and cropped; other files are refused with a reason.

Files are not trusted: the header's number of pixels is checked before anything is decoded, and all threads together
decode no more than :data:`MAX_PIXELS` at a time.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from .colour_profiles import to_srgb

# Pillow warns of odd metadata in files that it reads well; for everybody, since files are read in threads
warnings.filterwarnings("ignore", module=r"PIL\.")

SUFFIXES = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "ppm", "pgm", "jp2", "heic",
    "heif", "jxl",
)  # fmt: skip
"""Suffixes of files that are taken for images, lower case; those that cannot be read are named in the report."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "PPM", "JPEG2000")
"""Formats that are read, whatever a file is called. Pillow's other readers are off: that of EPS starts a program."""
PIXELS_VERSION = 2
"""Raised whenever this module gives other pixels for the same file, so that latent caches follow."""
MAX_PIXELS = 128_000_000
"""Images with more pixels are not decoded. A decoded pixel takes 4 bytes, and 4 more while it becomes RGB."""
MAX_FILE_BYTES = 512 * 2**20
"""Files with more bytes are not read."""
EMPTY_FILE = "it is empty (0 bytes)"
GREY = ("1", "L", "LA", "La")
"""Modes without colours."""
BAND_PIXELS = 2**22
"""Pixels that are converted at a time, where the conversion needs room."""

ORIENTATION = 0x0112
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""Errors that Pillow's readers raise on damaged files."""
BEGINNINGS = (
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG", "PNG"), (0, b"GIF8", "GIF"), (8, b"WEBP", "WebP"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (4, b"ftypavi", "AVIF"), (4, b"jP  ", "JPEG 2000"), (0, b"BM", "BMP"),
)  # fmt: skip
"""Offset in the file, bytes at it, format."""
UNREAD = (
    (4, b"ftyphe", "HEIC"), (4, b"ftypmif1", "HEIC"), (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL ", "JPEG XL"),
    (0, b"%PDF", "PDF"), (0, b"<svg", "SVG"), (0, b"<!DOCTYPE", "a web page"), (0, b"<html", "a web page"),
    (0, b"%!PS", "PostScript"), (0, b"PK\3\4", "an archive"), (0, b"version https://git-lfs", "a Git LFS pointer"),
)  # fmt: skip
"""The same for formats that have no reader."""


class BrokenImage(Exception):
    """A file that is not a readable image; the text says why."""


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none or the EXIF block is damaged (the pixels are still good)."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return value if value in TRANSPOSES else 1


@contextmanager
def _opened(stream: BinaryIO) -> Iterator[Image.Image]:
    """Open an image without decoding it, and check its size. Raises BrokenImage, also for errors in the block."""
    try:
        with Image.open(stream, formats=FORMATS) as image:
            _check_size(image)
            yield image
    except Image.UnidentifiedImageError as error:
        raise BrokenImage(_unidentified(stream)) from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(_too_large()) from error
    except DECODE_ERRORS as error:
        raise BrokenImage(_reason(error)) from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise BrokenImage(f"it has no pixels ({width}x{height})")
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"its header says {width}x{height}: {_too_large()}")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tile = [int(image.tag_v2.get(tag, 1)) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
        if tile[0] * tile[1] > MAX_PIXELS:
            raise BrokenImage(f"its tiles are {tile[0]}x{tile[1]}: {_too_large()}")


def _too_large() -> str:
    return f"images of more than {MAX_PIXELS // 10**6} million pixels are not decoded"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def _unidentified(stream: BinaryIO) -> str:
    """Describe bytes that no reader takes by how they begin."""
    stream.seek(0)
    head = stream.read(64)
    if not head:
        return EMPTY_FILE
    begins = [name for at, what, name in BEGINNINGS if head[at:].startswith(what)]
    if begins:
        return f"it begins like a {begins[0]} file and is damaged or cut short"
    other = [name for at, what, name in UNREAD if head[at:].lower().startswith(what.lower())]
    if other:
        return f"it is {other[0]}, for which there is no decoder here: convert it to JPEG, PNG or WebP"
    return "it is in no image format that can be read"


def probe(stream: BinaryIO) -> tuple[int, int]:
    """Return width and height in pixels of the upright image, from its header alone. Raises BrokenImage."""
    with _opened(stream) as image:
        width, height = _stored_size(image)
        return (height, width) if _orientation(image) >= 5 else (width, height)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height in pixels as the file has them; of a TIFF, Pillow's own size may be that of the upright
    image.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


def read_file(stream: BinaryIO) -> bytes:
    """Read all bytes of an image's file. Raises BrokenImage when they are too many."""
    data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BrokenImage(too_many_bytes())
    return data


def too_many_bytes() -> str:
    """Return why a large file is not read."""
    return f"files of more than {MAX_FILE_BYTES // 2**20} MiB are not read"


def decode(data: bytes) -> Image.Image:
    """Decode the first frame of an image to upright RGB, with transparency on white. Raises BrokenImage."""
    with _opened(io.BytesIO(data)) as image:
        image.load()
        transpose = TRANSPOSES.get(_orientation(image))
        upright = to_rgb(image)
        return upright if transpose is None else upright.transpose(transpose)


class _Budget:
    """A limit on the pixels that all threads together hold at a time."""

    def __init__(self, pixels: int) -> None:
        self._free, self._changed = pixels, threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels`, never more than the limit, are free, and hold them inside the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_budget = _Budget(MAX_PIXELS)


@contextmanager
def decoded(data: bytes) -> Iterator[Image.Image]:
    """Yield the result of :func:`decode`, once other threads hold few enough pixels."""
    width, height = probe(io.BytesIO(data))
    with _budget.of(width * height):
        yield decode(data)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit sRGB, by the embedded colour profile where there is one that fits."""
    profile, transparent = image.info.get("icc_profile"), image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bits, of which Pillow keeps the upper half
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        return _on_white(image, profile)
    if image.mode in ("P", "1", "YCbCr") and profile:
        image = image.convert("L" if image.mode == "1" else "RGB")
    return to_srgb(image, profile)


def _bands(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows [top, bottom) of about :data:`BAND_PIXELS` pixels."""
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    result = Image.new("RGB", image.size)
    for top, bottom in _bands(*image.size):
        band = image.crop((0, top, image.width, bottom))
        rgba = band.convert("RGBA")
        if profile:
            colours = band.convert("LA").getchannel("L") if image.mode in GREY else rgba.convert("RGB")
            alpha, rgba = rgba.getchannel("A"), to_srgb(colours, profile).convert("RGBA")
            rgba.putalpha(alpha)
        white = Image.new("RGBA", rgba.size, "white")
        result.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
    return result


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert grey levels of 16 or 32 bits, or floats, to 8 bits by the range of the type, not of the image; a level
    that stands for transparency (of a PNG) becomes transparent.
    """
    levels, transparent = np.asarray(image), image.info.get("transparency")
    if image.mode == "F":
        highest = levels.max(initial=0, where=np.isfinite(levels))
        full = 1.0 if highest <= 1.0 else 255.0 if highest <= 255.0 else 65535.0
    else:
        full = 65535.0 if levels.max() <= 65535 else 2.0**31 - 1
    result = np.empty(levels.shape, np.uint8)
    for top, bottom in _bands(*image.size):
        share = np.clip(levels[top:bottom].astype(np.float64) / full, 0, 1)
        result[top:bottom] = np.rint(np.nan_to_num(share) * 255)
    grey = Image.fromarray(result)
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return grey


def scale_and_crop(
    image: Image.Image, *, size: tuple[int, int], left: int, top: int, bucket: tuple[int, int], flip: bool = False
) -> NDArray[np.uint8]:
    """Scale the image to `size` and cut it to `bucket`, both (width, height), perhaps mirrored; shape (H, W, 3)."""
    box = (left, top, left + bucket[0], top + bucket[1])
    if image.size == size:
        cropped = image.crop(box)
    else:  # only the part that is kept is scaled: a 1 x 60,000 image must not become a huge one on the way
        across, down = image.width / size[0], image.height / size[1]
        part = (box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height))
        cropped = image.resize(bucket, Image.Resampling.LANCZOS, box=part)
    if flip:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(cropped)


def fit(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Scale the image to cover width x height and crop it in the middle, shape (H, W, 3)."""
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return scale_and_crop(image, size=size, left=left, top=top, bucket=(width, height))


def why_unread(error: object, key: str) -> str:
    """Return why an image could not be read: the error's own words, unless they are its name alone."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return "it is not there" if words in ("", key) else words
