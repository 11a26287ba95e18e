"""The ``filter_func`` of a dataset as data: conditions on columns, which are compared and never run as code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import eq, ge, gt, le, lt, ne
from typing import Any

from ..core.data.tables.columns import Columns, Row, value_of
from ..core.errors import BadValue

KEY = "filter_func"
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge,
    "in": lambda value, allowed: value in allowed,
    "not in": lambda value, refused: value not in refused,
}  # fmt: skip
SIZES = ("min_width", "min_height")
QUALITY, QUALITY_COLUMN = "quality_thresholds", "quality_column"
Scalar = str | int | float | bool


@dataclass(frozen=True)
class Condition:
    """A column's value compared with something; a row without a value does not pass."""

    column: str
    operator: str
    value: Any

    def holds(self, row: Row) -> bool:
        """Return whether the row passes. Raises BadValue when the two values cannot be compared."""
        found = value_of(row, self.column)
        if found is None:
            return False
        try:
            return OPERATORS[self.operator](found, self.value)
        except TypeError as error:
            problem = f"{self.column!r} holds {found!r}, which cannot be compared with {self.value!r}"
            raise BadValue(KEY, {self.column: {self.operator: self.value}}, problem, "compare with its kind") from error


@dataclass(frozen=True)
class Filter:
    """All conditions of a dataset; without any, every sample passes.

    Attributes:
        conditions: On columns.
        min_width: Upright width in pixels that an image has at least.
        min_height: Upright height in pixels.
    """

    conditions: tuple[Condition, ...] = ()
    min_width: int = 0
    min_height: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Filter:
        """Parse conditions: ``{"lang": "en", "score": {">=": 5}, "collection": ["a", "b"], "min_width": 512}``.

        Raises:
            ValueError: It is no condition.
        """
        conditions: list[Condition] = []
        for name, wanted in given.items():
            if name == QUALITY:
                conditions += _thresholds(wanted, given.get(QUALITY_COLUMN))
            elif name not in (*SIZES, QUALITY_COLUMN):
                conditions += _of_column(name, wanted)
        if QUALITY_COLUMN in given and QUALITY not in given:
            raise ValueError(f"{KEY} has {QUALITY_COLUMN} without {QUALITY}")
        return cls(tuple(conditions), *(_pixels(name, given.get(name, 0)) for name in SIZES))

    @property
    def names(self) -> list[str]:
        """The columns that conditions are on."""
        return [condition.column for condition in self.conditions]

    def check(self, columns: Columns) -> None:
        """Raise BadValue for a column that is not there."""
        for condition in self.conditions:
            if not columns.has(condition.column):
                raise columns.missing(KEY, condition.column, [condition.column])

    def passes(self, row: Row) -> bool:
        """Return whether a row's values pass."""
        return all(condition.holds(row) for condition in self.conditions)

    def fits(self, width: int, height: int) -> bool:
        """Return whether an image is large enough, in pixels."""
        return width >= self.min_width and height >= self.min_height


def _thresholds(wanted: Any, column: Any) -> list[Condition]:
    """Parse ``{"clip": 0.3}``: at least this value, in the columns of these names or inside `column`."""
    if not isinstance(wanted, Mapping):
        raise ValueError(f'{QUALITY} must be an object of least values, as {{"aesthetic": 5}}')
    prefix = f"{column}." if column else ""
    return [Condition(f"{prefix}{name}", ">=", least) for name, least in wanted.items()]


def _of_column(name: str, wanted: Any) -> list[Condition]:
    if isinstance(wanted, Scalar):
        return [Condition(name, "==", wanted)]
    if isinstance(wanted, Sequence):
        return [Condition(name, "in", tuple(wanted))]
    if not isinstance(wanted, Mapping):
        raise ValueError(f'{name!r} must be a value, a list of values, or comparisons as {{">=": 5}}')
    unknown = [operator for operator in wanted if operator not in OPERATORS]
    if unknown or not wanted:
        shown = f"the unknown comparison {unknown[0]!r}" if unknown else "no comparison"
        raise ValueError(f"{name!r} has {shown}; there are {', '.join(OPERATORS)}")
    return [Condition(name, operator, value) for operator, value in wanted.items()]


def _pixels(name: str, least: Any) -> int:
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise ValueError(f"{name} must be a whole number of pixels, not {least!r}")
    return least
