r"""The two points x_t and x' of one step of the teacher's solver, which consistency methods compare their student at.

Usually x_t is noised data and x' one guided step of the teacher from it, two predictions of the teacher for each sample
and step. With ``cached_trajectories`` both are neighbouring points of a trajectory that the teacher was sampled along
once, before training, from noise z to the data x(z):

    i ~ U{0 .. N-1},   x_t = the trajectory's point at t_i,   x' = its point at p_i

at the N times that the grid shares with the sampler's steps, t_i = T - 1 - (N - 1 - i) T / N. On a table of betas the
lowest point p_0 is not quite clean, and lies on the line of the last step: x' = alpha_0 x(z) + sigma_0 eps^ with the
eps^ of x_{t_0} and x(z). The function that is learned is the same, the end of the trajectory through a point; what
changes is where it is learned: on the teacher's own trajectories, at their one guidance scale, instead of around data
at a scale drawn anew for each sample. A teacher with guidance leaves the distribution of noised data, and there are as
many trajectories as were made; no image is needed.

References:
    Luo et al., Latent Consistency Models, arXiv 2310.04378.
    Luhman and Luhman, Knowledge Distillation in Iterative Generative Models, arXiv 2101.02388 (trajectories made once).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion import Prediction, Schedule, append_dims
from ..diffusion.guidance import GuidanceRange
from ..diffusion.segments import GridSteps
from ..diffusion.solvers import trailing_timesteps
from ..errors import UserError
from .method import Requirements

if TYPE_CHECKING:
    from ..diffusion.schedule import SolverGrid
    from .batch import Batch, Conditioning, Trajectories
    from .context import Context


class SolverSettings(GuidanceRange):
    """Settings of the teacher's solver; methods derive their own from it."""

    num_ddim_timesteps: GridSteps
    cached_trajectories: bool = False
    """Whether both points of a step come from trajectories that the teacher makes once (a distillation cache, at its
    guidance_scale; w_min and w_max have no effect): no call of the teacher in training, and no images."""

    def takes_guidance(self, model_type: str) -> bool:
        """Return True if a student of this type takes w as an input; trajectories have one scale."""
        return not self.cached_trajectories and super().takes_guidance(model_type)

    def notice(self, method: str) -> str:
        """Return the line that says what the teacher of `method` is guided by."""
        if not self.cached_trajectories:
            return super().notice(method)
        return (
            f"{method}: learns at points of the teacher's own trajectories, at the guidance scale of their "
            "distillation cache (w_min and w_max have no effect); the teacher is not called in training"
        )

    def requirements(self, *, guidance_embedding: bool = False, features: bool = False) -> Requirements:
        """Return the requirements of a method that compares the student with itself at both points.

        Args:
            guidance_embedding: Whether the student takes w as an input.
            features: Whether heads read features of the teacher.
        """
        return Requirements(
            images=not self.cached_trajectories,
            trajectory_points=self.num_ddim_timesteps if self.cached_trajectories else 0,
            guidance_embedding=guidance_embedding,
            features=features,
            zero_dropout=True,
            divides_timesteps=self.num_ddim_timesteps,
            finite_snr=True,
        )

    def check_grid(self, method: str, schedule: Schedule) -> None:
        """Raise UserError if trajectories of this model do not visit the times of the grid.

        Args:
            method: Name of the method, for the message.
            schedule: The model's noise schedule.
        """
        num_steps = self.num_ddim_timesteps
        if not self.cached_trajectories:
            return
        grid, visited = schedule.grid(num_steps).times, trailing_timesteps(schedule, num_steps).times.flip(0)
        if not torch.equal(grid, visited):
            raise UserError(
                f"distillation_config.{method}.cached_trajectories: a grid of num_ddim_timesteps = {num_steps} ends at "
                f"timestep {int(grid[-1])}, and trajectories of {num_steps} points begin at {int(visited[-1])}",
                f"set num_ddim_timesteps to a divisor of {schedule.num_train_timesteps}",
            )


def solver_pair(
    context: Context,
    batch: Batch,
    index: Tensor,
    *,
    grid: SolverGrid,
    cached: bool,
    prompts: Callable[[Conditioning], Conditioning] = lambda cond: cond,
    solve: Callable[[Tensor, Conditioning], Tensor],
) -> tuple[Tensor, Tensor, Conditioning]:
    """Return x_t and x' of steps of the grid, each of shape (B, C, h, w), and the conditioning of both.

    Args:
        context: The micro-batch's; the noise of noised data is its draw named ``noise``.
        batch: With trajectories if they are used, else with latents.
        index: Steps i of the grid in 0 .. N-1, int64, shape (B,).
        grid: The solver's grid of N steps.
        cached: Whether both points come from the batch's trajectories.
        prompts: Makes the conditioning of noised data from the batch's.
        solve: Takes x_t and the conditioning to x', by one step of the teacher's solver; without a gradient.
    """
    if cached:
        assert batch.trajectories is not None
        return *cached_pair(batch.trajectories, index, grid=grid, schedule=context.schedule), batch.trajectories.cond
    assert batch.latents is not None
    x_0, cond = batch.latents, prompts(batch.cond)
    eps = context.rng.randn("noise", x_0.shape[1:]).to(x_0.dtype)
    x_t = context.schedule.add_noise(x_0, eps, grid.times[index])
    with torch.no_grad():
        return x_t, solve(x_t, cond), cond


def cached_pair(
    trajectories: Trajectories, index: Tensor, *, grid: SolverGrid, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Return x_t and x' of steps of the grid on cached trajectories, each of shape (B, C, h, w).

    Args:
        trajectories: One per sample, with a multiple of N points.
        index: Steps i of the grid in 0 .. N-1, int64, shape (B,).
        grid: The solver's grid of N steps.
        schedule: The model's noise schedule.
    """
    stride = len(trajectories.times) // len(grid)
    point = stride * (len(grid) - 1 - index)
    x_t, _ = trajectories.at(point)
    x_prev, _ = trajectories.at((point + stride).clamp(max=len(trajectories.times) - 1))
    last = Prediction(trajectories.data, x_t, grid.times[index], schedule, "sample").ddim_step(grid.previous[index])
    return x_t, torch.where(append_dims(index == 0, x_t).bool(), last.to(x_t.dtype), x_prev)
