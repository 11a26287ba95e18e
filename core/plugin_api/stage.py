"""Stages of a training: their lengths, which weights are copied between roles, and the stage that a step belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


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
        restart_learning_rate: Whether warm-up and decay of the learning rate are this stage's own.
    """

    name: str
    num_steps: int
    copy: Mapping[str, str] = field(default_factory=dict)
    reset: Sequence[str] = ()
    restart_learning_rate: bool = False
