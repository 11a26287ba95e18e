"""The exact fixed point of trajectory consistency where the teacher is known: float64, grid index by grid index."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Teacher = Callable[[Tensor, Tensor], Tensor]
"""The guided teacher's x_0 at (x, t), for x of shape (B, 1) and t of shape (B,)."""


def edges(num_steps: int, num_segments: int) -> list[int]:
    """Points where segments begin, from their definition with real numbers."""
    return [math.ceil(b * num_steps / num_segments - 1e-9) for b in range(num_segments)]


def move(schedule, x: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """J_{t -> s} of a prediction x_0 at (x, t), for scalar times."""
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return ratio * x + (schedule.alpha(s) - ratio * schedule.alpha(t)) * x_0


def fixed_x_0(
    teacher: Teacher, schedule, x: Tensor, index: int, *, num_steps: int, num_segments: int = 1, wrong: bool = False
) -> Tensor:
    """The student's optimal x_0 at grid index `index`: least squares over the targets' times s.

    `wrong`: the target is the teacher's own jump, the classic mistake.
    """
    grid = schedule.grid(num_steps)
    t, t_prev = grid.times[index], grid.previous[index]
    x_prev = move(schedule, x, teacher(x, t.expand(len(x))), t, t_prev)
    below = torch.zeros_like(x)
    if index and wrong:
        below = teacher(x_prev, t_prev.expand(len(x)))
    elif index:
        below = fixed_x_0(teacher, schedule, x_prev, index - 1, num_steps=num_steps, num_segments=num_segments)
    above, norm = torch.zeros_like(x), torch.zeros((), dtype=torch.float64)
    for j in range(max(edge for edge in edges(num_steps, num_segments) if edge <= index), index + 1):
        s = grid.previous[j]
        target = x_prev if j == index else move(schedule, x_prev, below, t_prev, s)
        ratio = schedule.sigma(s) / schedule.sigma(t)
        d = schedule.alpha(s) - ratio * schedule.alpha(t)
        above, norm = above + d * (target - ratio * x), norm + d**2
    return above / norm
