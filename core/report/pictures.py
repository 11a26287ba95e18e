"""Pictures inside a page: small JPEGs as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

QUALITY = 82


@dataclass(frozen=True)
class Embedded:
    """A picture in a page.

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
    """The picture of a file, made smaller where it is larger than that.

    Args:
        file: PNG or JPEG.
        widest: In pixels.
        highest: In pixels.
    """
    from PIL import Image

    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    factor = min(1.0, widest / picture.width, highest / picture.height)
    if factor < 1:
        size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=QUALITY, optimize=True)
    text = base64.b64encode(stream.getvalue()).decode("ascii")
    return Embedded(f"data:image/jpeg;base64,{text}", picture.width, picture.height, factor < 1)
