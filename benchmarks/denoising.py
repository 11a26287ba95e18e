"""A method without a teacher: the student learns to denoise the images, as the teacher itself was trained.

It is what distillation is compared with in `smaller.py`, and a whole method in one file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distill.core.diffusion import Schedule
from distill.core.diffusion.regression import distance, truncated_snr
from distill.core.diffusion.sampler import Sampler
from distill.core.diffusion.solvers import deterministic_sampler
from distill.core.plugin_api.batch import Batch
from distill.core.plugin_api.context import Context
from distill.core.plugin_api.hookspecs import hookimpl
from distill.core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from pydantic import BaseModel, ConfigDict, Field


class Denoising(Method):
    """x_0 from x_t, with the weight max(SNR, 1); sampled with guidance, for which captions are dropped in training."""

    name = "denoising"

    class Config(BaseModel):
        """Settings of plain training."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        num_inference_steps: int = Field(25, ge=1, le=1000)
        """Steps of the student's sampler."""
        guidance_scale: float = Field(3.0, ge=0, le=100)
        """Guidance that the student is sampled with; each step is two calls of it."""

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """The teacher lends its weights at the start, and nothing else."""
        return [Role("teacher"), Role("student", trains=setup.model_type)]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Images, and a finite x_0."""
        return Requirements(finite_snr=True)

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """One step of arXiv 2006.11239 at a random time of the whole table."""
        assert batch.latents is not None
        schedule, rng, x_0 = context.schedule, context.rng, batch.latents
        times = context.grid(schedule.num_train_timesteps).times
        t = times[rng.integers("index", len(times))]
        eps = rng.randn("noise", x_0.shape[1:]).to(x_0.dtype)
        output = context.predict("student", schedule.add_noise(x_0, eps, t), t, batch.cond).x0
        weight = truncated_snr(schedule.log_snr(t)).to(output.dtype)
        losses = weight * distance(output, x_0, loss_type="l2", huber_c=0.0)
        yield Update("student", losses.mean(), per_sample=losses.detach(), t=t)

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """DDIM on the model's own spacing (Euler on a flow), with guidance."""
        steps = num_inference_steps or self.config.num_inference_steps
        return deterministic_sampler(schedule, steps, guidance_scale or self.config.guidance_scale, spacing=None)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Plain training."""
    return [Denoising]
