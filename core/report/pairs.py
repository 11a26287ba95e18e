"""Validation images of two runs beside each other: the same prompt, size and noise in a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.sampling import plural
from .images import Embedded, embed
from .run_contents import evenly

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_ROWS = 8
"""Prompts that are shown of each pair of validations."""
MOST_PAIRS = 12
PAIR_SIZE = {"widest": 1200, "highest": 2400}
LARGEST_CELL = 256
_SHOT = re.compile(r"\d+-(?P<prompt>.+)-(?P<size>\d+x\d+)-seed(?P<seed>\d+)")
_TEACHER = re.compile(r"(?P<shot>.+)-(?P<steps>\d+)steps-[0-9a-f]+")
Shot = tuple[str, str, int]
"""Prompt (as in file names), size and seed."""


@dataclass(frozen=True)
class Pair:
    """A validation of each run.

    Attributes:
        steps: Of both.
        label: What the page calls it.
        best: The labels of the runs whose best validation it shows.
        image: A row for each prompt; both students and the teacher in columns.
    """

    steps: tuple[int, int]
    label: str
    best: str
    image: Embedded


@dataclass(frozen=True)
class ValidationImages:
    """The images of one run's validations.

    Attributes:
        label: Of the run.
        steps: Step -> the student's image of each shot.
        teacher: The full teacher's image of each shot.
        teacher_steps: Its steps.
        best: Step of the best validation, if it is known.
    """

    label: str
    steps: Mapping[int, Mapping[Shot, Path]]
    teacher: Mapping[Shot, Path]
    teacher_steps: int
    best: int | None = None

    @classmethod
    def find(cls, label: str, output_dir: Path, *, best: int | None) -> ValidationImages:
        """Look for them in the folder of a run."""
        folder = output_dir / "validation"
        steps = {int(path.name[5:]): _shots(path) for path in sorted(folder.glob("step-*")) if path.name[5:].isdigit()}
        teacher: dict[int, dict[Shot, Path]] = {}
        for file in sorted((folder / "teacher").glob("*.png")):
            found = _TEACHER.fullmatch(file.stem)
            shot = found and _shot(found["shot"])
            if found and shot:
                teacher.setdefault(int(found["steps"]), {})[shot] = file
        made, full = {step: shots for step, shots in steps.items() if shots}, max(teacher, default=0)
        return cls(label, made, teacher.get(full, {}), full, best)

    def at(self, step: int) -> int:
        """Return the step of the last validation up to `step`; of the first where there is none so early."""
        return max((each for each in self.steps if each <= step), default=min(self.steps))


def _shots(folder: Path) -> dict[Shot, Path]:
    found = {_shot(file.stem): file for file in sorted(folder.glob("*.png"))}
    return {shot: file for shot, file in found.items() if shot}


def _shot(name: str) -> Shot | None:
    found = _SHOT.fullmatch(name)
    return (found["prompt"], found["size"], int(found["seed"])) if found else None


def common_shots(runs: Sequence[ValidationImages]) -> list[Shot]:
    """Return the shots that every validation of both runs has, in the first one's order."""
    first, *others = [shots for run in runs for shots in run.steps.values()]
    return [shot for shot in first if all(shot in shots for shots in others)]


def paired(runs: tuple[ValidationImages, ValidationImages]) -> list[Pair]:
    """Draw validations of both runs beside each other, at each step that either has, evenly over all of them.

    Where one has no validation at a step, its last one before is shown.
    """
    from ..drawing.grid import GridRow, labelled_grid

    shots, (one, two) = common_shots(runs)[:MOST_ROWS], runs
    if not shots:
        return []
    teachers, read, pairs = _teachers(runs, shots), cache(_read), []
    for step in _chosen(sorted({*one.steps, *two.steps}), [run.best for run in runs]):
        steps = one.at(step), two.at(step)
        columns = [f"{run.label}\nstep {at:,}" for run, at in zip(runs, steps, strict=True)]
        students = [run.steps[at] for run, at in zip(runs, steps, strict=True)]
        rows = [
            GridRow(
                shot[0].replace("-", " "), [read(each[shot]) for each in (*students, *teachers.values())],
                f"{shot[1]}, seed {shot[2]}",
            )
            for shot in shots
        ]  # fmt: skip
        grid = labelled_grid(rows, [*columns, *teachers], largest_cell=LARGEST_CELL)
        best = " and ".join(run.label for run, at in zip(runs, steps, strict=True) if at == run.best == step)
        label = f"Step {step:,}" if steps[0] == steps[1] else f"Steps {steps[0]:,} and {steps[1]:,}"
        pairs.append(Pair(steps, label, best, embed(grid, **PAIR_SIZE)))
    return pairs


def _teachers(runs: Sequence[ValidationImages], shots: Sequence[Shot]) -> dict[str, Mapping[Shot, Path]]:
    """Return the teachers' images by the heads of their columns: one column where both runs have the same."""
    whole = [run for run in runs if all(shot in run.teacher for shot in shots)]
    seen = {tuple(run.teacher[shot].read_bytes() for shot in shots) for run in whole}
    if len(seen) < 2:
        return {f"teacher\n{plural(run.teacher_steps, 'step')}": run.teacher for run in whole[:1]}
    return {f"teacher of {run.label}\n{plural(run.teacher_steps, 'step')}": run.teacher for run in whole}


def _chosen(steps: Sequence[int], also: Sequence[int | None]) -> list[int]:
    wanted = [steps.index(step) for step in also if step in steps]
    return [steps[place] for place in evenly(len(steps), MOST_PAIRS, also=wanted)]


def _read(file: Path) -> Image:
    from PIL import Image

    with Image.open(file) as opened:
        return opened.convert("RGB")
