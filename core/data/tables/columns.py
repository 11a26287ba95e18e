"""Columns of a table: found by name or by their usual names, with dots into nested ones, and their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadValue
from ...utils.prompt_library import shortened
from ...utils.suggest import nearest

CAPTIONS = ("caption", "text")
"""Columns of captions that are looked for where none is named."""
WIDTHS, HEIGHTS = ("width",), ("height",)
NAMES = ("file_name", "filename", "path", "key", "id")
"""Columns that name the images beside a table, where none is named."""
MAX_LISTED = 30
"""Columns that a message lists."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """The columns that a table has.

    Attributes:
        names: As they are written; nested columns are reached with dots (``json.caption``).
        where: Name of the table, for messages.
    """

    names: Sequence[str]
    where: str

    def has(self, name: str) -> bool:
        """Return whether the column is there."""
        return name in self.names

    def usual(self, names: Sequence[str]) -> str | None:
        """Return the first of `names` that is there, whatever the case of its letters; None if none is."""
        folded = {name.lower(): name for name in reversed(self.names)}
        return next((name if self.has(name) else folded[name] for name in names if name in folded), None)

    def wanted(self, key: str, given: Sequence[str]) -> list[str]:
        """Return the columns that the entry's `key` names.

        Raises:
            BadValue: One is not there; with the columns that there are.
        """
        for name in given:
            if not self.has(name):
                raise self.missing(key, given[0] if len(given) == 1 else list(given), [name])
        return list(given)

    def required(self, key: str, given: Sequence[str], usual: Sequence[str]) -> list[str]:
        """Return the columns that `key` names, or the first usual one. Raises BadValue where there is none."""
        if given:
            return self.wanted(key, given)
        found = self.usual(usual)
        if found is None:
            raise self.missing(key, None, usual)
        return [found]

    def missing(self, key: str, value: object, names: Sequence[str]) -> BadValue:
        """Make the error that none of `names` is there."""
        close = next((match for name in names if (match := nearest(name, self.names))), None)
        there = ", ".join(map(repr, self.names[:MAX_LISTED])) or "none"
        more = f" and {len(self.names) - MAX_LISTED} more" if len(self.names) > MAX_LISTED else ""
        problem = f"{self.where} has no column {' or '.join(map(repr, names))}; it has {there}{more}"
        remedy = f"did you mean {close!r}? " if close else ""
        return BadValue(key, value, problem, f"{remedy}name one of them as {key}")


def names_in(value: object, prefix: str = "") -> list[str]:
    """List the dotted names inside a nested value: ``{"json": {"caption": ...}}`` has json and json.caption."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = next((item for item in value if isinstance(item, Mapping)), None)
    if not isinstance(value, Mapping):
        return []
    names = []
    for name, inner in value.items():
        names += [f"{prefix}{name}", *names_in(inner, f"{prefix}{name}.")]
    return names


def value_of(row: Row, name: str) -> Any:
    """Return the value of a column, by its own name or by its dots; for a list, the value inside each element."""
    return row[name] if name in row else _inside(row, name.split("."))


def _inside(value: Any, path: Sequence[str]) -> Any:
    if not path:
        return value
    if isinstance(value, Mapping):
        return _inside(value.get(path[0]), path[1:])
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_inside(item, path) for item in value]
    return None


def texts_of(value: object) -> list[str]:
    """Return the texts of a cell that holds a text, a list of texts or nothing. Raises ValueError for anything else."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [text for item in value for text in texts_of(item)]
    kind = "bytes" if isinstance(value, bytes) else shortened(value)
    raise ValueError(f"is {kind}, not a text")


def edge_of(value: Any) -> int:
    """Return a cell's edge length in pixels, 0 where it holds no such number."""
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        return 0
    return int(number) if 0 < number < 2**31 and number == int(number) else 0


@dataclass(frozen=True)
class CaptionColumns:
    """The columns that hold the captions of a row.

    Attributes:
        main: Columns whose texts are all captions of the sample.
        fallback: Columns that are used when those are empty.
    """

    main: Sequence[str]
    fallback: Sequence[str] = ()

    @classmethod
    def of(cls, columns: Columns, main: Sequence[str], fallback: Sequence[str]) -> CaptionColumns:
        """Choose the columns that the entry's keys name, else the usual one. Raises BadValue."""
        return cls(
            columns.required("caption_column", main, CAPTIONS),
            columns.wanted("fallback_caption_column", fallback),
        )

    @property
    def names(self) -> list[str]:
        """All columns of captions."""
        return [*self.main, *self.fallback]

    def texts(self, row: Row) -> list[str]:
        """Return the captions of a row. Raises ValueError that names the column."""
        found = self._texts(row, self.main)
        return found if any(text.strip() for text in found) else self._texts(row, self.fallback) or found

    @staticmethod
    def _texts(row: Row, names: Sequence[str]) -> list[str]:
        found = []
        for name in names:
            try:
                found += texts_of(value_of(row, name))
            except ValueError as error:
                raise ValueError(f"{name!r} {error}") from error
        return found
