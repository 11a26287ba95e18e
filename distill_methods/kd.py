r"""Knowledge distillation: the student learns the end of the teacher's trajectory from each noise it begins with.

A deterministic sampler is a function of its noise. Its trajectories (z, x(z)) are made once, before training
(``dataset_type: distillation_cache``), and one step regresses on them:

    L = || D_theta(z, T) - x(z) ||^2                                                          one step

With N steps the student also learns from the points at which N even steps of the teacher's trajectory begin,

    i ~ U{0 .. N-1},   L = || D_theta(x_{t_i}, t_i) - x(z) ||^2,   x_{t_0} = z                N steps

and is then sampled with fresh noise between its steps: each denoises to the end of the trajectory through its input. D
is the network's x_0. No teacher is called in training, and no image is needed.

Each noise has one target, so only what the student cannot tell apart is averaged: unlike a regression on data, its
minimum is the exact flow map, at the times it is trained at. Detail that a network of finite size cannot express comes
out blurred, which is why this is a warm-up, or a term beside distribution matching, more often than a method by itself.

References:
    Luhman and Luhman, Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed,
        arXiv 2101.02388.
    Yin et al., One-step Diffusion with Distribution Matching Distillation (its regression term), arXiv 2311.18828.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..core.diffusion import Schedule
from ..core.diffusion.multistep import multistep_sampler, one_step_timestep
from ..core.diffusion.regression import HuberC, LossType, distance
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.solvers import trailing_timesteps
from ..core.errors import UserError
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from ..core.plugin_api.recommended import read_recommended


class KD(Method):
    """Knowledge distillation on the teacher's trajectories from noise: 1 or a few steps, a warm-up for others."""

    name = "kd"
    recommended = read_recommended(__file__, name)

    class Config(BaseModel):
        """Settings of knowledge distillation."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        num_inference_steps: int = Field(4, ge=1, le=16)
        """N, the student's number of steps: 1 learns from noise alone, more from as many points of a trajectory."""
        one_step_time: int | None = Field(None, ge=1)
        """Timestep (of the model's training timesteps) that a one-step student is called at; None: 399, on a flow 1."""
        loss_type: LossType = "l2"
        huber_c: HuberC = 0.001

        @model_validator(mode="after")
        def _one_step(self) -> KD.Config:
            if self.one_step_time is not None and self.num_inference_steps > 1:
                raise ValueError(
                    f"one_step_time = {self.one_step_time} is for num_inference_steps = 1, which is "
                    f"{self.num_inference_steps}: leave one_step_time out"
                )
            return self

    @classmethod
    def example(cls) -> Mapping[str, Any]:
        """Return settings that reach a student quickly."""
        return {"num_inference_steps": 2}

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the teacher, which is not called in training, and the student."""
        return [Role("teacher"), Role("student", trains=setup.model_type)]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require trajectories of the teacher instead of images; a finite x_0 at all times."""
        return Requirements(images=False, trajectory_points=config.num_inference_steps, finite_snr=True)

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the student's update: regress on the trajectory's end from one of its points."""
        assert batch.trajectories is not None
        config, trajectories = self.config, batch.trajectories
        stride = len(trajectories.times) // config.num_inference_steps
        x_t, t = trajectories.at(stride * context.rng.integers("point", config.num_inference_steps))
        if config.num_inference_steps == 1:
            t = torch.full_like(t, self._times(context.schedule, 1)[0])
        output = context.predict("student", x_t, t, trajectories.cond).x0
        losses = distance(output, trajectories.data, loss_type=config.loss_type, huber_c=config.huber_c)
        yield Update("student", losses.mean(), per_sample=losses.detach(), t=t)

    def _times(self, schedule: Schedule, num_steps: int) -> list[float]:
        """Return the falling times of `num_steps` calls: those of the trajectory, or that of a one-step student."""
        if self.config.num_inference_steps > 1:
            return trailing_timesteps(schedule, num_steps).times.tolist()
        return [one_step_timestep(schedule, self.config.one_step_time, key="distillation_config.kd.one_step_time")]

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return multistep sampling at times of training, guidance off: it is built in."""
        trained = self.config.num_inference_steps
        steps = num_inference_steps or trained
        if trained % steps:
            known = [str(count) for count in range(1, trained + 1) if trained % count == 0]
            raise UserError(
                f"{steps} inference steps: this student is trained at {trained} "
                f"time{'s' if trained > 1 else ''} of the path, which {steps} even steps do not visit",
                f"sample with {' or '.join(known)}, or set distillation_config.kd.num_inference_steps to {steps}",
            )
        return multistep_sampler(schedule, self._times(schedule, steps), guidance_scale or 0.0)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [KD]
