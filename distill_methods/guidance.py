r"""Guidance distillation: one call of the student replaces the teacher's two with classifier-free guidance.

    t ~ U{0 .. T-1} (shift(j / T) on a flow),  w ~ U[w_min, w_max],  x_t = alpha_t x_0 + sigma_t eps     from data
    D^w  = (1 + w) D(x_t, t, c) - w D(x_t, t, no prompt)                      the guided teacher
    L    = max(alpha_t^2 / sigma_t^2, 1) || D_theta(x_t, t, c, w) - D^w ||^2                  or another loss_weight

in the paper's w, one less than the guidance scale g of uncond + g (cond - uncond). The student is sampled with as many
steps as its teacher, each at half the cost; other methods reduce the number of steps, and can use it as their teacher
(stage one of the paper; stage two is ``progressive``).

In full training the student takes w as input (a guidance embedding), so that it can be sampled at any guidance of its
range. A LoRA has no such input. Since D^w is linear in w, the minimiser of L over a range is D^w at its middle; so a
LoRA is trained at the middle throughout, which has the same optimum without the spread. Full training at one scale
(w_min = w_max) needs no input either.

References:
    Meng et al., On Distillation of Guided Diffusion Models, arXiv 2210.03142 (stage one, w ~ U[w_min, w_max]).
    Ho and Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598.
    Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models (weights), arXiv 2202.00512.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import ConfigDict, Field

from ..core.diffusion import Schedule
from ..core.diffusion.guidance import GuidanceRange, embedded_scale
from ..core.diffusion.importance import TimestepSampling
from ..core.diffusion.regression import ErrorWeight, distance, error_weight
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.solvers import deterministic_sampler
from ..core.errors import UserError
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.grid_draws import DrawsGrid
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update


class Guidance(DrawsGrid):
    """Guidance distillation: guided images without the second call, at the teacher's number of steps."""

    name = "guidance"

    class Config(GuidanceRange):
        """Settings of guidance distillation."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        w_min: float = Field(2.0, ge=0, le=100)
        """Lower end of the range of guidance, in the units of guidance_convention."""
        w_max: float = Field(10.0, ge=0, le=100)
        """Upper end of the range of guidance. A fully trained student takes w as an input; a LoRA learns the middle."""
        loss_weight: ErrorWeight = "truncated_snr"
        timestep_sampling: TimestepSampling = "uniform"
        num_inference_steps: int = Field(25, ge=1, le=1000)
        """Steps that the student is validated and exported with unless the run says otherwise."""

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the base, and a student that takes w where it is trained in full over a range."""
        return [
            Role("teacher"),
            Role("student", trains=setup.model_type, guidance_embedding=config.takes_guidance(setup.model_type)),
        ]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require images; a finite x_0 at all times; a guidance input for full training over a range."""
        if setup.guided_by_input:
            raise UserError(
                "distillation_method = 'guidance' teaches a student the guidance scale, and this model takes it as an "
                "input already: there is nothing to distil",
                "choose a method that takes fewer steps, as lcm",
            )
        return Requirements(guidance_embedding=config.takes_guidance(setup.model_type), finite_snr=True)

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the student's update, one step of algorithm 1 of arXiv 2210.03142."""
        assert batch.latents is not None
        config, schedule, rng, x_0 = self.config, context.schedule, context.rng, batch.latents
        times = context.grid(schedule.num_train_timesteps).times
        draw = self.draw_step(context, len(times))
        t = times[draw.index]
        eps = rng.randn("noise", x_0.shape[1:]).to(x_0.dtype)
        x_t = schedule.add_noise(x_0, eps, t)
        told = config.takes_guidance(self.setup.model_type)
        scale = rng.uniform("w", *(config.scales if told else (self._middle, self._middle)))

        with torch.no_grad():
            target = context.predict_guided(x_t, t, batch.cond, scale).x0
        output = context.predict("student", x_t, t, batch.cond, guidance=scale - 1 if told else None).x0

        weight = error_weight(schedule, t, kind=config.loss_weight, prediction_type=context.prediction_type)
        losses = weight.to(output.dtype) * distance(output, target, loss_type="l2", huber_c=0.0)
        yield self.student_update(draw, losses, t=t)

    @property
    def _middle(self) -> float:
        return sum(self.config.scales) / 2

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return DDIM on the model's own spacing (Euler with explicit sigmas on a flow), at the teacher's number of
        steps.

        A student that takes w gets the middle of its range unless another scale in the range is asked for; the others
        have their guidance built in, and theirs is off.
        """
        told = self.config.takes_guidance(self.setup.model_type)
        guidance = embedded_scale(guidance_scale, self.config.scales) if told else guidance_scale or 0.0
        steps = num_inference_steps or self.config.num_inference_steps
        return deterministic_sampler(schedule, steps, guidance, spacing=None)

    def notices(self) -> list[str]:
        """Return which guidance the student learns."""
        low, high = self.config.scales
        if self.config.takes_guidance(self.setup.model_type):
            return [f"guidance: the student takes the guidance scale as an input, {low:g} to {high:g}"]
        line = f"guidance: the student has the guidance scale {self._middle:g} built in"
        return [line + (f", the middle of {low:g} to {high:g}: a LoRA has no input for it" if low < high else "")]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [Guidance]
