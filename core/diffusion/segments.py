r"""Segments of a trajectory that a solver's grid is cut into, and renoising of a point on it.

A grid of N steps has N + 1 points p_0 < p_1 < ... < p_N, step i going from p_{i+1} to p_i. Cut into K segments, the
b-th begins at the point ceil(b N / K): the points that K even steps of a few-step sampler visit, so that such a
sampler steps from edge to edge, whether K divides N or not. Where K' divides K, its edges are among those of K.

References:
    Ren et al., Hyper-SD: Trajectory Segmented Consistency Model (equation 11), arXiv 2404.13686.
    Wang et al., Phased Consistency Models, arXiv 2405.18407.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from . import Schedule

GridSteps = Annotated[
    int,
    Field(
        ge=1,
        le=1000,
        description="N, the grid of the teacher's solver; it must divide the model's number of training timesteps.",
    ),
]
"""The setting `num_ddim_timesteps` of methods that follow the teacher from step to step of a grid."""


def segment_edge(index: Tensor, *, num_steps: int, num_segments: int) -> Tensor:
    """Return the point at which the segment of each step begins, the largest edge <= i, shape (B,) (arXiv 2404.13686).

    Args:
        index: Steps i of the grid in 0 .. N-1, int64, shape (B,).
        num_steps: N.
        num_segments: K, at most N; one segment begins at point 0, N segments are single steps.
    """
    number = index * num_segments // num_steps
    return (number * num_steps + num_segments - 1) // num_segments


def snapped_edges(name: str, number: int, *, num_steps: int) -> str:
    """Return what is to be said where `number` segments, which the method calls `name`, are not even; else ""."""
    if num_steps % number == 0:
        return ""
    edges = segment_edge(torch.arange(num_steps), num_steps=num_steps, num_segments=number).unique()
    return (
        f"{number} {name} do not divide num_ddim_timesteps = {num_steps} evenly; "
        f"their edges are snapped to the grid's points {', '.join(map(str, edges.tolist()))}"
    )


def renoise(schedule: Schedule, x_s: Tensor, s: Tensor, u: Tensor, eps: Tensor) -> Tensor:
    """Return a sample of p(x_u | x_s): r x_s + sqrt(sigma_u^2 - r^2 sigma_s^2) eps with r = alpha_u / alpha_s.

    It is exactly x_s where u = s.

    Args:
        schedule: The model's noise schedule.
        x_s: Noised samples, shape (B, ...).
        s: Their times in the schedule's units, shape (B,); alpha_s must not be 0.
        u: Times to noise them to, u >= s, shape (B,).
        eps: Noise, shape (B, ...).
    """
    (alpha_s, sigma_s), (alpha_u, sigma_u) = schedule.coefficients(s, x_s), schedule.coefficients(u, x_s)
    kept = alpha_u / alpha_s
    return kept * x_s + (sigma_u**2 - (kept * sigma_s) ** 2).clamp(min=0).sqrt() * eps


def even_times(schedule: Schedule, *, num_steps: int, num_grid_steps: int) -> list[float]:
    """Return `num_steps` falling times spread evenly over the training grid from its noisy end, in the schedule's
    units.

    These are the timesteps of diffusers' LCMScheduler and TCDScheduler with ``original_inference_steps`` N.
    """
    times = schedule.grid(num_grid_steps).times
    return [float(times[num_grid_steps - 1 - j * num_grid_steps // num_steps]) for j in range(num_steps)]


def above_grid(num_steps: int, *, num_grid_steps: int) -> str:
    """Return what is wrong with settings whose `num_inference_steps` do not fit their grid; "" where they do."""
    if num_steps <= num_grid_steps:
        return ""
    return (
        f"num_inference_steps = {num_steps} is above num_ddim_timesteps = {num_grid_steps}: "
        "the sampler walks on the training grid"
    )


def check_on_grid(method: str, num_steps: int, *, num_grid_steps: int) -> None:
    """Raise UserError if `num_steps` of a sampler do not fit the grid that the student of `method` was trained on."""
    if num_steps > num_grid_steps:
        raise UserError(
            f"{num_steps} inference steps are more than {method}'s num_ddim_timesteps = {num_grid_steps}: "
            "the sampler visits times of the training grid",
            f"sample with at most {num_grid_steps} steps, or train with a finer grid",
        )
