"""Learning-rate schedules: factors of the base rate by optimizer step, whatever the number of processes.

Each is a pure function of the step, so a resumed run needs no state. Where diffusers' ``get_scheduler`` has the name,
the values are the same. ``p`` below is the progress after warm-up, from 0 to 1; warm-up rises linearly from 0 over
`warmup_steps`.

==================== ==============================================================================================
constant             1, without warm-up
constant_with_warmup 1
linear               1 - p
cosine               (1 + cos(pi p)) / 2
cosine_with_restarts the same, restarting `num_cycles` times at 1
polynomial           (1 - p)^power
sine                 (1 + sin(2 pi num_cycles p + pi/2)) / 2: smooth waves that start and end at 1
==================== ==============================================================================================

All but the constant ones end at `end_factor` (or swing down to it) instead of 0: factor = end + (1 - end) * shape.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..plugin_api.stage import Stage

DecayCurve = Callable[[float, float, float], float]


def _restarts(p: float, num_cycles: float, power: float) -> float:
    return 0.0 if p >= 1 else (1 + math.cos(math.pi * ((num_cycles * p) % 1))) / 2


SHAPES: dict[str, DecayCurve | None] = {
    "constant": None,
    "constant_with_warmup": None,
    "linear": lambda p, num_cycles, power: 1 - p,
    "cosine": lambda p, num_cycles, power: (1 + math.cos(math.pi * p)) / 2,
    "cosine_with_restarts": _restarts,
    "polynomial": lambda p, num_cycles, power: (1 - p) ** power,
    "sine": lambda p, num_cycles, power: (1 + math.sin(2 * math.pi * num_cycles * p + math.pi / 2)) / 2,
}
"""Schedule name -> shape, a function of p, num_cycles and power; None is constant."""


def lr_lambda(
    name: str,
    warmup_steps: int,
    total_steps: int | None,
    *,
    num_cycles: float = 1,
    power: float = 1.0,
    end_factor: float = 0.0,
) -> Callable[[int], float]:
    """Return the function from optimizer step, counted from 0, to the factor of the learning rate.

    Args:
        name: One of :data:`SHAPES`.
        warmup_steps: Optimizer steps of linear rise; ``constant`` has none.
        total_steps: Optimizer steps of the whole run, warm-up included; not needed by the constant ones.
        num_cycles: Restarts or waves.
        power: Exponent of ``polynomial``.
        end_factor: Share of the base rate that is left at the end (or at the bottom of a wave).

    Raises:
        ValueError: An unknown name, or a schedule that needs `total_steps` without it.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown lr_scheduler {name!r}; known: {', '.join(SHAPES)}")
    if name == "constant":
        return _one
    shape = SHAPES[name]
    if shape is None:
        return partial(_warm, warmup_steps=warmup_steps, after=_one)
    if total_steps is None:
        raise ValueError(f"lr_scheduler {name!r} needs the total number of steps")

    def decayed(step: int) -> float:
        p = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return end_factor + (1 - end_factor) * shape(min(p, 1.0), num_cycles, power)

    return partial(_warm, warmup_steps=warmup_steps, after=decayed)


@dataclass(frozen=True)
class Segment:
    """Stages with one warm-up and decay.

    Attributes:
        name: Name of the first of them.
        num_steps: Their length in optimizer steps.
        learning_rate: Their learning rate before the schedule; None is the run's.
    """

    name: str
    num_steps: int
    learning_rate: float | None


def segments(stages: Sequence[Stage]) -> list[Segment]:
    """Return the parts of a run with a schedule of their own: a stage begins one by restarting or changing the rate."""
    found: list[Segment] = []
    for stage in stages:
        rate = stage.learning_rate
        if stage.restart_learning_rate or not found or rate != found[-1].learning_rate:
            found.append(Segment(stage.name, stage.num_steps, rate))
        else:
            found[-1] = replace(found[-1], num_steps=found[-1].num_steps + stage.num_steps)
    return found


def staged(
    make: Callable[[int], Callable[[int], float]], stages: Sequence[Stage], *, learning_rate: float | None = None
) -> Callable[[int], float]:
    """Return one schedule over the whole run, begun anew by each stage that restarts or changes the learning rate.

    Args:
        make: Makes the schedule for a number of steps.
        stages: The run's stages, in order.
        learning_rate: The rate that the factors are of, for roles that follow the rates of the stages; None for roles
            that keep theirs.
    """
    parts = segments(stages)
    starts = [0, *accumulate(part.num_steps for part in parts[:-1])]
    schedules = [make(part.num_steps) for part in parts]

    def factor(step: int) -> float:
        number = max(0, bisect_right(starts, step) - 1)
        shape, rate = schedules[number](step - starts[number]), parts[number].learning_rate
        return shape if rate is None or learning_rate is None else shape * (rate / learning_rate)

    return factor


def _one(step: int) -> float:
    return 1.0


def _warm(step: int, *, warmup_steps: int, after: Callable[[int], float]) -> float:
    return step / warmup_steps if step < warmup_steps else after(step)
