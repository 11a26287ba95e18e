"""What `distill plugins list` says of each plugin."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..utils.packages import install_line, missing
from ..utils.suggest import did_you_mean

if TYPE_CHECKING:
    from ..registry.registry import Registry

HOOKS = "hooks"
"""The kind of a plugin that registers no name and only watches runs."""
PIPE_WIDTH = 10_000
"""Columns of a table that nobody looks at: whoever reads a pipe wants one line for each plugin."""

TITLES = ("kind", "name", "version", "from", "usable here", "what it is")
WIDEST = 36
"""Columns of a cell that is kept whole for the description's sake."""


@dataclass(frozen=True)
class Row:
    """One registered name, or a plugin that registers none."""

    kind: str
    name: str
    version: str
    source: str
    """``built in``, ``package NAME VERSION`` or the path of a file."""
    plugin: str
    description: str
    aliases: tuple[str, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()
    """(import name, what to pip install) of each package that it needs and that is not installed."""

    @property
    def origin(self) -> str:
        """Its source without the version."""
        return self.source.removesuffix(f" {self.version}") if self.version else self.source

    @property
    def usable(self) -> str:
        """Yes, or the line that makes it so."""
        return "yes" if not self.missing else f"no: {install_line(dict(self.missing))}"

    def as_json(self) -> dict[str, Any]:
        """Return the row for programs."""
        return {
            "kind": self.kind,
            "name": self.name,
            "aliases": list(self.aliases),
            "version": self.version or None,
            "source": self.source,
            "plugin": self.plugin,
            "usable": not self.missing,
            "missing": [{"package": package, "install": install} for package, install in self.missing],
            "description": self.description,
        }


def rows(registry: Registry, kind: str | None = None) -> list[Row]:
    """Return all names of `kind`, or of every kind.

    Raises:
        UserError: There is no such kind.
    """
    from ..registry.registry import KINDS

    kinds = [*KINDS, HOOKS]
    if kind is not None:
        kinds = [chosen_kind(kind, kinds)]
    return [row for each in kinds for row in _of_kind(registry, each)]


def chosen_kind(kind: str, kinds: Sequence[str]) -> str:
    """Return the kind of `kinds` that was meant, written with dashes or underscores.

    Raises:
        UserError: There is none.
    """
    found = kind.strip().lower().replace("-", "_")
    if found not in kinds:
        written = [each.replace("_", "-") for each in kinds]
        remedy = f"{did_you_mean(found, written)}kinds: {', '.join(written)}."
        raise UserError(f"there is no kind of plugin {kind!r}.", remedy)
    return found


def _of_kind(registry: Registry, kind: str) -> list[Row]:
    if kind == HOOKS:
        return [
            Row(kind, each.name, each.version, each.source, each.name, f"watches runs: {', '.join(each.hooks)}")
            for each in registry.loaded
            if not any(hook.startswith("register_") for hook in each.hooks)
        ]
    found = [(registry.get(kind, name), registry.provenance(kind, name)) for name in registry.names(kind)]
    return [
        Row(
            kind.replace("_", "-"), each.name, origin.version, origin.source, origin.plugin, first_line(each),
            each.aliases, tuple(missing(each.packages).items()),
        )
        for each, origin in found
    ]  # fmt: skip


def first_line(found: type[Any]) -> str:
    """Return the first line of a class's own docstring."""
    return (inspect.getdoc(found) or "").split("\n", 1)[0]


def as_table(found: Sequence[Row]) -> None:
    """Print a table: fitted to a terminal, or a line for each plugin into a pipe or a file."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    cells = [(row.kind, row.name, row.version or "-", row.origin, row.usable, row.description) for row in found]
    for column, title in enumerate(TITLES[:-1]):
        longest = max((len(each[column]) for each in cells), default=0)
        table.add_column(title, overflow="fold", min_width=min(WIDEST, max(longest, len(title))))
    table.add_column(TITLES[-1], no_wrap=True, overflow="ellipsis")
    for row, texts in zip(found, cells, strict=True):
        table.add_row(*(Text(text, style="red" if row.missing and text == row.usable else "") for text in texts))
    console.print(table)
