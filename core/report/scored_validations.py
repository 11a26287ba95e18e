"""The scores of a run's validations: their curves, the best one, and whether the run got worse after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..drawing.curves import Curve, Series, curve
from ..evaluation.result import format_score
from ..evaluation.validation_scores import Course, score_files
from ..evaluation.validation_scores import ValidationScores as StepScores
from .reader import Reader


@dataclass(frozen=True)
class Reference:
    """The full teacher's scores on the samples of validations.

    Attributes:
        samples: What tells which samples they are.
        scores: By name.
        label: Of the line, as ``teacher, 50 steps``.
    """

    samples: Mapping[str, Any]
    scores: Mapping[str, float]
    label: str


@dataclass(frozen=True)
class ScoredValidations:
    """What a page says of the scores of validations.

    Attributes:
        course: The validations that compare with each other.
        levels: Score -> (label, value) of the teacher.
        best: Step of the best validation.
        verdict: Which is the best, and by what.
        worse: That the run got worse; empty where it did not, or where that is not clear.
        notes: What is left out, and how to read the curves.
    """

    course: Course
    levels: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    best: int | None = None
    verdict: str = ""
    worse: str = ""
    notes: Sequence[str] = ()

    def better(self, name: str) -> bool | None:
        """Return whether more of a score is better; None where that is not known."""
        return self.course.validations[-1].higher_is_better.get(name)

    def series(self, name: str, *, label: str = "", number: int = 0) -> Series:
        """Return the course of one score, for a chart of several runs with the run's label and number."""
        having = [each for each in self.course.validations if name in each.scores]
        best = self.course.best(name)
        steps, values = [each.step for each in having], [each.scores[name] for each in having]
        return Series(label, np.array(steps, float), np.array(values, float), best.step if best else None, number)

    def curves(self) -> list[Curve]:
        """Return a chart of each score."""
        levels = {name: [level] for name, level in self.levels.items()}
        better = self.course.validations[-1].higher_is_better
        return [
            curve(name, [self.series(name)], levels.get(name, ()), better=better.get(name))
            for name in self.course.names
        ]

    def says(self, step: int) -> str:
        """Return the score that validations are ranked by, of that step; empty where there is none."""
        name = self.course.ranked_by
        found = next((each for each in self.course.validations if each.step == step), None)
        return f"{spaced(name)} {format_score(found.scores[name])}" if name and found else ""


def scored_validations(
    output_dir: Path, reader: Reader, *, last_step: int, reference: Reference | None
) -> ScoredValidations | None:
    """Read the scores of a run's validations; None where there are none.

    Args:
        output_dir: Of the run.
        reader: Leaves out what is damaged.
        last_step: That the run has taken.
        reference: The teacher's scores, if there are any.
    """
    found = [reader.read(file, StepScores.read, None) for file in score_files(output_dir)]
    course = Course.of([each for each in found if each], last_step=last_step)
    if course is None:
        return None
    newest, best, name = course.validations[-1], course.best(), course.ranked_by
    verdict = ""
    if best and name and len(course.validations) > 1:
        direction = "higher" if newest.higher_is_better[name] else "lower"
        verdict = f"The best validation is that of step {best.step:,}, by {spaced(name)}: "
        verdict += f"{format_score(best.scores[name])} ({direction} is better)."
    worse = course.worse() or ""
    levels = {}
    if reference is not None and reference.samples == newest.samples:
        levels = {
            score: (reference.label, value) for score, value in reference.scores.items() if score in newest.scores
        }
    return ScoredValidations(
        course, levels, best.step if best else None, verdict, worse and f"{worse[0].upper()}{worse[1:]}.",
        _notes(course, newest),
    )  # fmt: skip


def _notes(course: Course, newest: StepScores) -> list[str]:
    samples = newest.samples
    size = f"{samples['width']}x{samples['height']}"
    notes = [
        f"{samples['num_samples']:,} images of {size} at each validation, always from the same prompts and noise: few, "
        "but the same, so that steps compare. A Fréchet distance of so few is too large, and compares with none of "
        "another number of images."
    ]
    if course.num_others:
        plural = "" if course.num_others == 1 else "s"
        notes.append(
            f"{course.num_others:,} earlier validation{plural}, scored on other samples or at other steps, left out."
        )
    notes += [f"Left out: {spaced(name)}, {reason}." for name, reason in newest.left_out.items()]
    return notes


def spaced(name: str) -> str:
    """Return a score's name as people read it."""
    return name.replace("_", " ")
