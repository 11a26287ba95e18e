# pyright: reportAttributeAccessIssue=false
"""Embedded colour profiles (ICC): the colours that a file means, as sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

FITTING = {"RGB ": ("RGB",), "GRAY": ("L",), "CMYK": ("CMYK",)}
"""Modes of images by a profile's own colours."""
CLOSE = 2
"""Levels of 255 by which a profile that calls itself sRGB may differ from sRGB and be taken as it."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to RGB with sRGB's colours.

    A profile that cannot be read or does not fit its image is left out: the pixels are taken as they are. Grey images
    with a profile of colours, as many programs write them, are taken as colours.
    """
    if profile and not _is_srgb(profile) and (transform := _transform_of(image, profile)) is not None:
        transform, image = transform
        return ImageCms.applyTransform(image, transform) or image.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _transform_of(image: Image.Image, profile: bytes) -> tuple[ImageCms.ImageCmsTransform, Image.Image] | None:
    """Return the transform of a profile and the image in the mode that it takes; None where it does not fit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        colours = source.profile.xcolor_space
        if colours == "RGB " and image.mode == "L":
            image = image.convert("RGB")
        if image.mode not in FITTING.get(colours, ()):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB"), image
    except (ImageCms.PyCMSError, OSError):
        return None


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes) -> bool:
    """Return whether a profile is sRGB itself: it calls itself so, and leaves a grid of colours where they are.

    The name alone is no proof: there are profiles of linear light with sRGB's primaries, and with its name.
    """
    if b"sRGB" not in profile:
        return False
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    found = _transform_of(Image.fromarray(grid), profile)
    if found is None:
        return True  # it says nothing that could be applied
    moved = np.asarray(ImageCms.applyTransform(found[1], found[0]))
    return bool(np.abs(moved.astype(int) - grid).max() <= CLOSE)
