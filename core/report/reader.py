"""Reading a run's folder part by part: one that is damaged is left out, and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..utils.files import read_json_object

T = TypeVar("T")


class Reader:
    """Reads the parts of a run's folder one by one: one that is damaged is left out, and said."""

    def __init__(self) -> None:
        self.left_out: list[str] = []

    def read(self, file: Path, part: Callable[[Path], T], otherwise: T) -> T:
        """Return what `part` makes of a file; `otherwise` where there is no such file, or it cannot be read."""
        if not file.is_file():
            return otherwise
        try:
            return part(file)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.message if isinstance(error, UserError) else f"{file}: {type(error).__name__}: {error}"
            self.left_out.append(f"left out of this page, since it cannot be read: {reason}")
            return otherwise


def json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run. Raises UserError where there is none."""
    return read_json_object(file, remedy="restore it, or remove it to leave it out")
