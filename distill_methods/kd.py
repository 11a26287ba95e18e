r"""Knowledge distillation: the student learns the end of the teacher's trajectory from each noise it begins with.

A deterministic sampler is a function of its noise. Its trajectories (z, x(z)) are made once, before training
(``dataset_type: distillation_cache``), and one step regresses on them:

    L = || D_theta(z, T) - x(z) ||^2                                                          one step

With N steps the student also learns from the points at which N even steps of the teacher's trajectory begin,

    i ~ U{0 .. N-1},   L = || D_theta(x_{t_i}, t_i) - x(z) ||^2,   x_{t_0} = z                N steps

and is then sampled with fresh noise between its steps: each denoises to the end of the trajectory through its input. D
is the network's x_0. No teacher is called in training, and no image is needed.

Instead of in latents the two can be compared as people see them (``loss_type: lpips``), decoded to pixels,

    L = LPIPS(decode(D_theta(x_t, t)), decode(x(z))) + latent_weight || D_theta(x_t, t) - x(z) ||^2

Each noise has one target, so only what the student cannot tell apart is averaged: unlike a regression on data, its
minimum is the exact flow map, at the times it is trained at. Detail that a network of finite size cannot express comes
out blurred, which is why this is a warm-up, or a term beside distribution matching, more often than a method by itself.

References:
    Luhman and Luhman, Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed,
        arXiv 2101.02388.
    Yin et al., One-step Diffusion with Distribution Matching Distillation (its regression term), arXiv 2311.18828.
    Yin et al., Improved Distribution Matching Distillation (the warm-up of its one-step student), arXiv 2405.14867.
    Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), arXiv 1801.03924.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..core.diffusion import Schedule
from ..core.diffusion.multistep import multistep_sampler, one_step_timestep
from ..core.diffusion.regression import HuberC, distance
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.solvers import trailing_timesteps
from ..core.errors import UserError
from ..core.plugin_api.auxiliary import LPIPS_NETWORK, METRICS_ADDRESS, LpipsNetwork, check_file
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from ..core.plugin_api.recommended import read_recommended
from ..core.settings.types import LocalPath

PERCEPTUAL = "perceptual_distance"
"""Role of the network of LPIPS."""


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
        loss_type: Literal["l2", "huber", "lpips"] = "l2"
        """l2: squared difference of latents; huber: sqrt(d^2 + huber_c^2) - huber_c, robust to outliers; lpips: the
        perceptual distance of the decoded images."""
        huber_c: HuberC = 0.001
        lpips_network: LocalPath | None = None
        """TorchScript file of the VGG16 that lpips is defined by (vgg16.pt of StyleGAN's metrics); needed for lpips."""
        latent_weight: float = Field(0.0, ge=0, le=1e6)
        """Weight of the squared difference of latents beside lpips; 0: none."""

        @property
        def perceptual(self) -> bool:
            """True if images are compared rather than latents."""
            return self.loss_type not in ("l2", "huber")

        @model_validator(mode="after")
        def _of_pixels(self) -> KD.Config:
            given = {"lpips_network": self.lpips_network is not None, "latent_weight": self.latent_weight > 0}
            for key in [key for key, set_ in given.items() if set_ and not self.perceptual]:
                raise ValueError(f"{key} has no effect with loss_type = {self.loss_type}: set loss_type to lpips")
            return self

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
        """Return the teacher, which is not called in training, the student, and the network of LPIPS if it is used."""
        roles = [Role("teacher"), Role("student", trains=setup.model_type)]
        if config.perceptual:
            roles.append(Role(PERCEPTUAL, build=LpipsNetwork(config.lpips_network)))
        return roles

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require trajectories of the teacher instead of images; a finite x_0 at all times; pixels for LPIPS."""
        return Requirements(
            images=False,
            trajectory_points=config.num_inference_steps,
            finite_snr=True,
            pixels=config.perceptual,
        )

    @classmethod
    def check_sources(cls, config: Any, *, path: str) -> None:
        """Raise UserError unless the network of LPIPS is there, where it is used."""
        if config.perceptual:
            remedy = f"download {METRICS_ADDRESS}/{LPIPS_NETWORK}"
            check_file(config.lpips_network, key=f"{path}.lpips_network", remedy=remedy)

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the student's update: regress on the trajectory's end from one of its points."""
        assert batch.trajectories is not None
        config, trajectories = self.config, batch.trajectories
        stride = len(trajectories.times) // config.num_inference_steps
        x_t, t = trajectories.at(stride * context.rng.integers("point", config.num_inference_steps))
        if config.num_inference_steps == 1:
            t = torch.full_like(t, self._times(context.schedule, 1)[0])
        output = context.predict("student", x_t, t, trajectories.cond).x0
        metrics: dict[str, Tensor] = {}
        if config.perceptual:
            losses, metrics = self._perceptual(context, output, trajectories.data)
        else:
            losses = distance(output, trajectories.data, loss_type=config.loss_type, huber_c=config.huber_c)
        yield Update("student", losses.mean(), metrics, per_sample=losses.detach(), t=t)

    def _perceptual(self, context: Context, output: Tensor, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses (B,) of decoded images, and their parts to log, from latents (B, C, h, w) of both."""

        def compare(ours: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                target = context.decode(theirs)
            return context.call(PERCEPTUAL, context.decode(ours), target)

        seen = context.by_sample(compare, output, data)
        metrics, weight = {"lpips": seen.detach().mean()}, self.config.latent_weight
        if not weight:
            return seen, metrics
        latent = distance(output, data, loss_type="l2", huber_c=self.config.huber_c)
        return seen + weight * latent, {**metrics, "latent": latent.detach().mean()}

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
