"""Stages of a training: their lengths, which weights are copied between roles, and the stage that a step belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UserError


@dataclass(frozen=True)
class StageProgress:
    """The stage that a step belongs to, and the position of the step in it.

    Attributes:
        index: Number of the stage, from 0.
        name: Name of the stage.
        step: Optimizer steps since the stage began.
        num_steps: Length of the stage in optimizer steps.
    """

    index: int
    name: str
    step: int
    num_steps: int


def stage_of(stages: Sequence[Stage], step: int) -> StageProgress:
    """Return the stage that optimizer step `step` belongs to; steps past the end belong to the last."""
    start = 0
    for index, stage in enumerate(stages):
        if step < start + stage.num_steps or index == len(stages) - 1:
            return StageProgress(index, stage.name, step - start, stage.num_steps)
        start += stage.num_steps
    return StageProgress(0, "all", step, 0)


@dataclass(frozen=True)
class Stage:
    """A part of a run, and what happens before its first step.

    Attributes:
        name: Name for people and logs.
        num_steps: Length in optimizer steps.
        copy: Role -> the role whose weights it takes before the first step (not done before the run's first).
        reset: Roles whose optimizer starts afresh.
        restart_learning_rate: Whether warm-up and decay of the learning rate are this stage's own. They always are
            where the rate differs from that of the stage before.
        learning_rate: Learning rate before the schedule, for roles without one of their own; None is the run's.
    """

    name: str
    num_steps: int
    copy: Mapping[str, str] = field(default_factory=dict)
    reset: Sequence[str] = ()
    restart_learning_rate: bool = False
    learning_rate: float | None = None


def lengths_by_share(total: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers in these proportions that sum to `total`; partial sums are rounded, so none drifts.

    Args:
        total: Optimizer steps to share out.
        shares: Proportions, at least one above 0; a share of 0 gets nothing.
    """
    ends = [round(total * part / sum(shares)) for part in accumulate(shares)]
    return [end - start for start, end in pairwise([0, *ends[:-1], total])]


class StageSettings(BaseModel):
    """A part of the run as users name it: its length, and what begins anew with it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """Name of the stage, for stage_weights and in logs."""
    steps: int | None = Field(None, ge=1)
    """Length in optimizer steps; absent: by share."""
    share: float | None = Field(None, gt=0, le=1e9)
    """Length in proportion to the other stages without steps, which share what those with steps leave; absent: 1."""
    learning_rate: float | None = Field(None, gt=0, le=1)
    """Learning rate during this stage, for networks without one of their own; absent: the run's."""
    reset_optimizer: bool = False
    """Whether the student's optimizer starts afresh; warm-up and decay of the learning rate then do too, as they do
    where the rate changes."""

    @model_validator(mode="after")
    def _one_length(self) -> StageSettings:
        if self.steps is not None and self.share is not None:
            raise ValueError(f"{self.name} has steps = {self.steps} and share = {self.share:g}: give one of them")
        return self


def stages_of_settings(settings: Sequence[StageSettings], total_steps: int) -> list[Stage]:
    """Return the stages that users named, for a run of `total_steps` optimizer steps.

    Raises:
        UserError: Their lengths do not fit that number.
    """
    return [
        Stage(
            each.name, length, reset=("student",) if each.reset_optimizer else (),
            restart_learning_rate=each.reset_optimizer, learning_rate=each.learning_rate,
        )
        for each, length in zip(settings, _lengths(settings, total_steps), strict=True)
    ]  # fmt: skip


def _lengths(settings: Sequence[StageSettings], total_steps: int) -> list[int]:
    """Return the steps of each stage: as they are named, the rest by shares."""
    named = sum(each.steps or 0 for each in settings)
    shares = [each.share or 1.0 for each in settings if each.steps is None]
    rest = iter(lengths_by_share(total_steps - named, shares) if shares else ())
    lengths = [each.steps or next(rest) for each in settings]
    if sum(lengths) != total_steps or min(lengths) < 1:
        found = ", ".join(f"{each.name} {length}" for each, length in zip(settings, lengths, strict=True))
        enough = f"at least {named + len(shares)}" if shares else str(named)
        raise UserError(
            f"the stages do not fit max_train_steps = {total_steps}: their lengths would be {found}",
            f"set max_train_steps to {enough}, or give stages a share in place of steps",
        )
    return lengths
