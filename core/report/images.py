"""Images inside a page: small JPEGs as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

QUALITY = 82


@dataclass(frozen=True)
class Embedded:
    """An image in a page.

    Attributes:
        uri: ``data:image/jpeg;base64,...``.
        width: In pixels.
        height: In pixels.
        shrunk: Whether the file is larger.
    """

    uri: str
    width: int
    height: int
    shrunk: bool


def embedded(file: Path, *, widest: int, highest: int) -> Embedded:
    """The image of a file, made smaller where it is larger than that.

    Args:
        file: PNG or JPEG.
        widest: In pixels.
        highest: In pixels.
    """
    from PIL import Image

    with Image.open(file) as opened:
        return embed(opened.convert("RGB"), widest=widest, highest=highest)


def embed(image: Image.Image, *, widest: int, highest: int) -> Embedded:
    """Return an RGB image for a page, made smaller where it is larger than that, in pixels."""
    from PIL import Image

    factor = min(1.0, widest / image.width, highest / image.height)
    if factor < 1:
        size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        image = image.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=QUALITY, optimize=True)
    text = base64.b64encode(stream.getvalue()).decode("ascii")
    return Embedded(f"data:image/jpeg;base64,{text}", image.width, image.height, factor < 1)
