r"""Latent consistency models, full and as a LoRA.

A consistency function f(x_t, t) maps every point of one trajectory of the teacher's guided probability-flow ODE to the
trajectory's clean end. One training step, with a grid of N times t_i = (i + 1) k - 1, k = T // N:

    i ~ U{0 .. N-1},  t = t_i,  t' = max(t - k, 0)
    x_t  = alpha_t x_0 + sigma_t eps                                from data
    (x0^, eps^) = teacher with guidance scale g ~ U[w_min, w_max]   at (x_t, t)
    x'   = alpha_t' x0^ + sigma_t' eps^                             one DDIM step
    L    = d( f_theta(x_t, t), sg f_theta-(x', t') )

with f(x, t) = c_skip(t) x + c_out(t) x0_theta(x, t) and the boundary f(x, 0) = x:

    c_skip = s^2 / ((m t)^2 + s^2),   c_out = m t / sqrt((m t)^2 + s^2),   s = 0.5

On a flow the clean end is reached exactly (sigma_0 = 0), so f = x - sigma v needs no c_skip. theta- is the student
itself for LoRA, its exponential moving average for full training; never the teacher, for then nothing is bootstrapped.

With ``cached_trajectories`` x_t and x' are neighbours on a trajectory of the teacher that was made before training
(:mod:`..core.plugin_api.solver_pairs`), at one guidance scale, and no call of the teacher is left in a step.

A LoRA has no guidance input: w only augments the teacher. Full training feeds w to the student, so that it can be run
at any guidance of the range.

References:
    Luo et al., Latent Consistency Models, arXiv 2310.04378.
    Luo et al., LCM-LoRA: A Universal Stable-Diffusion Acceleration Module, arXiv 2311.05556.
    Song et al., Consistency Models, arXiv 2303.01469.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.diffusion import Prediction, Schedule
from ..core.diffusion.consistency import EmaTarget, consistency_function, has_ema_target
from ..core.diffusion.guidance import HighestGuidance, LowestGuidance, embedded_scale
from ..core.diffusion.importance import TimestepSampling
from ..core.diffusion.regression import HuberC, LossType, distance
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.segments import GridSteps, above_grid, check_on_grid, even_times
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.grid_draws import DrawsGrid
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from ..core.plugin_api.recommended import read_recommended
from ..core.plugin_api.solver_pairs import SolverSettings, solver_pair


class LCM(DrawsGrid):
    """Latent consistency distillation: 4 to 8 steps without guidance, as a LoRA or a full model."""

    name = "lcm"
    guidance_keys = ("w_min", "w_max")
    recommended = read_recommended(__file__, name)

    class Config(SolverSettings):
        """Settings of latent consistency distillation."""

        num_ddim_timesteps: GridSteps = 50
        w_min: LowestGuidance = 4.0
        w_max: HighestGuidance = 16.0
        ema_target: EmaTarget = None
        loss_type: LossType = "l2"
        huber_c: HuberC = 0.001
        timestep_sampling: TimestepSampling = "uniform"
        timestep_scaling_factor: float = Field(10.0, gt=0)
        """m of the boundary scalings: how fast f turns from the identity to the network away from t = 0."""
        num_inference_steps: int = Field(4, ge=1, le=50)
        """Steps that the student is validated and exported with unless the run says otherwise."""

        @model_validator(mode="after")
        def _fitting(self) -> LCM.Config:
            if problem := above_grid(self.num_inference_steps, num_grid_steps=self.num_ddim_timesteps):
                raise ValueError(problem)
            return self

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the roles: the student (a full one takes w if it is a range), its average as target if asked."""
        takes_guidance = config.takes_guidance(setup.model_type)
        student = Role("student", trains=setup.model_type, guidance_embedding=takes_guidance)
        averaged = has_ema_target(config.ema_target, setup.model_type)
        target = [Role("target", ema_of="student", ema_decay=0.95)] if averaged else []
        return [Role("teacher"), student, *target]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require images or trajectories; equal passes of student and target; a guidance input if w is a range."""
        return config.requirements(guidance_embedding=config.takes_guidance(setup.model_type))

    @property
    def _target(self) -> str:
        return "target" if has_ema_target(self.config.ema_target, self.setup.model_type) else "student"

    @property
    def _takes_guidance(self) -> bool:
        return self.config.takes_guidance(self.setup.model_type)

    def result_role(self) -> str:
        """Return the exported role: the average where there is one."""
        return self._target

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the student's update, one step of algorithm 1 of arXiv 2310.04378."""
        config, rng = self.config, context.rng
        grid = context.grid(config.num_ddim_timesteps)
        draw = self.draw_step(context, len(grid))
        t, t_prev = grid.times[draw.index], grid.previous[draw.index]
        scale = rng.uniform("w", *config.scales)
        w = scale - 1 if self._takes_guidance else None
        x_t, x_prev, cond = solver_pair(
            context, batch, draw.index, grid=grid, cached=config.cached_trajectories,
            solve=lambda x, cond: context.predict_guided(x, t, cond, scale, guided=config.guided).ddim_step(t_prev),
        )  # fmt: skip

        with torch.no_grad():
            target = self._f(context.predict(self._target, x_prev, t_prev, cond, guidance=w))
        output = self._f(context.predict("student", x_t, t, cond, guidance=w))

        losses = distance(output, target, loss_type=config.loss_type, huber_c=config.huber_c)
        yield self.student_update(draw, losses, t=t)

    def _f(self, prediction: Prediction) -> Tensor:
        return consistency_function(prediction, timestep_scaling_factor=self.config.timestep_scaling_factor)

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return LCMScheduler on the training grid (FlowMatchLCMScheduler with sigmas on a flow), guidance off.

        A student with a guidance embedding gets the middle of its range instead: 0 or 1 would feed it w <= 0.
        """
        steps = num_inference_steps or self.config.num_inference_steps
        self.config.check_grid(self.name, schedule)
        check_on_grid(self.name, steps, num_grid_steps=self.config.num_ddim_timesteps)
        guidance = embedded_scale(guidance_scale, self.config.scales) if self._takes_guidance else guidance_scale or 0.0
        if schedule.clean_at_zero:
            sigmas = even_times(schedule, num_steps=steps, num_grid_steps=self.config.num_ddim_timesteps)
            # the grid is shifted already: the scheduler must not do it again
            return Sampler(
                "FlowMatchLCMScheduler", {"shift": 1.0, "use_dynamic_shifting": False}, steps, guidance,
                {"sigmas": sigmas},
            )  # fmt: skip
        config = {
            "original_inference_steps": self.config.num_ddim_timesteps,
            "timestep_scaling": self.config.timestep_scaling_factor,
        }
        return Sampler("LCMScheduler", config, steps, guidance)

    def notices(self) -> list[str]:
        """Both conventions of the guidance, and what a LoRA does with it."""
        line = self.config.notice(self.name)
        if self.config.scales[0] < 1 and not self.config.cached_trajectories:
            line += "; below a scale of 1 the prompt is weakened, not strengthened"
        return [line]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [LCM]
