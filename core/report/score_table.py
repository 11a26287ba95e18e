"""The table of teacher against student, as ``evaluation.json`` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.result import format_score
from ..evaluation.sampling import describe_guidance, plural
from .images import Embedded
from .reader import json_object
from .scored_validations import Reference, spaced


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it says, and the number in full."""

    text: str
    full: str = ""


@dataclass(frozen=True)
class Scores:
    """Teacher against student."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]
    """(role, cells)."""
    about: str
    left_out: Mapping[str, str]
    image: Embedded | None
    higher_is_better: Mapping[str, bool | None] = field(default_factory=dict)
    plain: Sequence[Mapping[str, Any]] = ()
    """The rows as they stand in the file."""
    reference: Reference | None = None


def read_table(file: Path) -> Scores:
    """Read the scores of ``evaluation.json``."""
    found = json_object(file)
    names = list(found["higher_is_better"])
    data = f"; distances to the data are to {found['num_data']:,} of its images" if found["num_data"] else ""
    return Scores(
        ["", *heads(found["higher_is_better"])],
        [(row["role"], cells(row, names)) for row in found["rows"]],
        f"{found['num_samples']:,} images of {found['width']}x{found['height']} each, from the same noise, "
        f"on {found['device']}{data}. ↑: higher is better.",
        found["left_out"],
        None,
        found["higher_is_better"],
        found["rows"],
        _reference(found),
    )


def _reference(found: Mapping[str, Any]) -> Reference | None:
    """Return the scores of the full teacher on the samples of validations; None where there are none."""
    beside = found.get("validation_reference")
    if beside is None:
        return None
    scores = {name: float(value) for name, value in beside["scores"].items()}
    return Reference(dict(beside["samples"]), scores, f"teacher, {plural(int(beside['steps']), 'step')}")


def heads(higher_is_better: Mapping[str, bool | None]) -> list[str]:
    """Return the heads of a table of scores, after the name."""
    arrows = {True: "\N{NO-BREAK SPACE}↑", False: "\N{NO-BREAK SPACE}↓", None: ""}
    scores = [f"{spaced(name)}{arrows[better]}" for name, better in higher_is_better.items()]
    return ["steps", "guidance", *scores, "seconds per image"]


def cells(row: Mapping[str, Any], names: Sequence[str]) -> list[Cell]:
    """Return a row of a table of those scores."""
    guidance = describe_guidance(row["guidance"]).removeprefix("guidance ").replace("no guidance", "none")
    numbers = [*(row["scores"].get(name) for name in names), row["seconds_per_image"]]
    return [
        Cell(row["name"]),
        Cell(str(row["steps"])),
        Cell(guidance),
        *(Cell(format_score(number), "" if number is None else str(number)) for number in numbers),
    ]
