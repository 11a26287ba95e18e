"""Types of configuration values that say how they are read: relative paths, resolutions, lists written as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
LONGEST_EDGE = 16_384
"""Pixels of an edge that no image is made or trained above."""


class Settings(BaseModel):
    """Base of every part: unknown keys refused, attribute docstrings are the descriptions, values do not change."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def is_url(text: str) -> bool:
    """Return whether a text is a URL rather than a path."""
    return bool(_URL.match(text))


class Relative:
    """A mark on a text that may be a path relative to its file, or a hub id when nothing lies there."""


class Anywhere(Relative):
    """A mark on a text that is a path relative to its file, or a URL."""


class LocalRelative:
    """A mark on a path that is relative to its file."""


HubOrPath = Annotated[str, Relative()]
"""Hub id, or a path relative to the file that names it."""
LocalPath = Annotated[Path, LocalRelative()]
"""Path relative to the file that names it."""
PathOrUrl = Annotated[str, Anywhere(), BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""Path relative to the file that names it, or a URL (``s3://bucket/folder``, also ``gs://`` and ``az://``)."""


def split_names(value: Any) -> Any:
    """Turn ``"a, b"`` and ``["a", "b"]`` into the tuple (a, b); ``none`` and nothing into ()."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, Sequence) and list(value) == ["none"]:
        return ()
    return value


def split_numbers(value: Any) -> Any:
    """Turn ``"1,2,4"``, ``4`` and ``[1, 2, 4]`` into a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, int | float):
        return [value]
    return value


def parse_resolution(text: object) -> tuple[int, int]:
    """Parse ``"1280x768"`` into (width, height); a bare ``1024`` is a square. Raises ValueError."""
    if isinstance(text, Sequence) and not isinstance(text, str) and len(text) == 2:
        width, height = text
    else:
        parts = str(text).lower().replace("×", "x").split("x")
        width, height = parts if len(parts) == 2 else (parts[0], parts[0]) if len(parts) == 1 else ("", "")
    try:
        size = int(width), int(height)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not WIDTHxHEIGHT in pixels, as '1024x1024' or '1024x1024,1280x768'") from None
    if min(size) < 8:
        raise ValueError(f"{text!r} has an edge below 8 pixels; resolutions are WIDTHxHEIGHT, as '1024x1024'")
    if max(size) > LONGEST_EDGE:
        raise ValueError(f"{text!r} has an edge above {LONGEST_EDGE:,} pixels; resolutions are WIDTHxHEIGHT in pixels")
    return size


def parse_resolutions(value: Any) -> Any:
    """Turn a comma-separated text, a number or a list into a tuple of (width, height)."""
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(parse_resolution(part.strip() if isinstance(part, str) else part) for part in parts)


Names = Annotated[tuple[str, ...], BeforeValidator(split_names)]
AttentionKernels = Annotated[
    tuple[Literal["flash3", "flash", "cudnn", "efficient", "math"], ...], BeforeValidator(split_names)
]
Integers = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(min_length=1), BeforeValidator(split_numbers)
]
Resolutions = Annotated[tuple[tuple[int, int], ...], BeforeValidator(parse_resolutions)]


def one_or_many(value: Any) -> Any:
    """Turn a single text into a tuple of one."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str | Path) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]
