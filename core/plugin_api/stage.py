"""Stages of a training: their lengths, whose weights become another's, and where a step lies in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageProgress:
    """Where in the method's stages a step lies.

    Attributes:
        index: Number of the stage, from 0.
        name: Its name.
        step: Steps since it began.
        num_steps: Its length.
    """

    index: int
    name: str
    step: int
    num_steps: int


def stage_of(stages: Sequence[Stage], step: int) -> StageProgress:
    """The stage that optimizer step `step` belongs to; steps past the end belong to the last."""
    start = 0
    for index, stage in enumerate(stages):
        if step < start + stage.num_steps or index == len(stages) - 1:
            return StageProgress(index, stage.name, step - start, stage.num_steps)
        start += stage.num_steps
    return StageProgress(0, "all", step, 0)


@dataclass(frozen=True)
class Stage:
    """A part of a run, in optimizer steps; what happens before its first step.

    Attributes:
        name: For people and logs.
        num_steps: Its length.
        copy: Role -> the role whose weights it takes before the first step (not done before the run's first).
        reset: Roles whose optimizer starts afresh.
        restart_learning_rate: Whether warm-up and decay of the learning rate are this stage's own.
    """

    name: str
    num_steps: int
    copy: Mapping[str, str] = field(default_factory=dict)
    reset: Sequence[str] = ()
    restart_learning_rate: bool = False
