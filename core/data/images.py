"""Pictures of any mode, upright, as RGB on white, scaled and cropped."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

# Pillow warns of odd metadata in files that it reads well; for everybody, since files are read in threads
warnings.filterwarnings("ignore", module=r"PIL\.")

SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "ppm", "pgm", "jp2")
"""Endings of files that are taken for pictures, lower case."""
PIXELS_VERSION = 1
"""Raised whenever this module gives other pixels for the same file, so that latent caches follow."""

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
    NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's readers raise on damaged files."""


class BrokenImage(Exception):
    """A file that is no readable picture; the text says why."""


def _orientation(image: Image.Image) -> int:
    """EXIF orientation (1 when there is none, or when the EXIF block itself is damaged: the pixels are still good)."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return value if value in TRANSPOSES else 1


def probe(stream: BinaryIO) -> tuple[int, int]:
    """Width and height of a picture when upright, from its header alone. Raises BrokenImage."""
    try:
        with Image.open(stream) as image:
            width, height = image.size
            turned = _orientation(image) >= 5
    except DECODE_ERRORS as error:
        raise BrokenImage(_reason(error)) from error
    if min(width, height) < 1:
        raise BrokenImage(f"it has no pixels ({width}x{height})")
    return (height, width) if turned else (width, height)


def decode(data: bytes) -> Image.Image:
    """The first frame of a picture, upright, in RGB whatever its mode, transparency on white. Raises BrokenImage."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            transpose = TRANSPOSES.get(_orientation(image))
            picture = to_rgb(image)
            return picture if transpose is None else picture.transpose(transpose)
    except DECODE_ERRORS as error:
        raise BrokenImage(_reason(error)) from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is in no picture format that can be read"
    return text[:200] if text else type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit sRGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bit(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return _to_srgb(image)


def _to_8_bit(image: Image.Image) -> NDArray[np.uint8]:
    """Grey levels of 16 or 32 bits, or floats, as 8 bits: by the range of the type, not of the picture."""
    levels = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        full = 1.0 if levels.max() <= 1.0 else 255.0 if levels.max() <= 255.0 else 65535.0
    else:
        full = 65535.0 if levels.max() <= 65535 else 2.0**31 - 1
    return np.rint(np.clip(levels / full, 0, 1) * 255).astype(np.uint8)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Through the embedded colour profile where it says something else than sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode in ("RGB", "CMYK") and profile and b"sRGB" not in profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            result = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            result = None  # a profile that does not fit its picture: the pixels are taken as they are
        if result is not None:
            return result
    return image if image.mode == "RGB" else image.convert("RGB")


def scale_and_crop(
    image: Image.Image, *, size: tuple[int, int], left: int, top: int, bucket: tuple[int, int], flip: bool = False
) -> NDArray[np.uint8]:
    """The picture scaled to `size` and cut to `bucket`, both (width, height), perhaps mirrored; shape (H, W, 3)."""
    box = (left, top, left + bucket[0], top + bucket[1])
    if image.size == size:
        cropped = image.crop(box)
    else:  # only the part that is kept is scaled: a 1 x 60,000 picture must not become a huge one on the way
        across, down = image.width / size[0], image.height / size[1]
        part = (box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height))
        cropped = image.resize(bucket, Image.Resampling.LANCZOS, box=part)
    if flip:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(cropped)


def fit(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """The picture scaled to cover width x height and cropped in the middle, shape (H, W, 3)."""
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return scale_and_crop(image, size=size, left=left, top=top, bucket=(width, height))
