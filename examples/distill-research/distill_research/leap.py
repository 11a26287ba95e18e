r"""Leap distillation: one step of the student goes as far as K guided steps of its teacher.

The teacher walks from noise to data in K N steps, at the times t_0 > t_1 > ... > t_KN. One training step:

    j ~ U{0 .. N-1},   t = t_jK,   s = t_(j+1)K
    x_t  = alpha_t x_0 + sigma_t eps                        from data
    x_s  = where K guided steps of the teacher lead from x_t
    x_0* = what the student must predict at x_t for its one step to end at x_s
    L    = max(alpha_t^2 / sigma_t^2, 1) || x0_theta(x_t, t) - x_0* ||^2

A stage of progressive distillation takes two steps into one (K = 2); here all are taken at once, without stages.

References:
    Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
"""

import distill
import torch
from distill.core.diffusion.regression import truncated_snr
from distill.core.diffusion.solvers import data_of_step, deterministic_sampler, step_to, trailing_timesteps
from pydantic import Field


class Leap(distill.Method):
    """Leap distillation: N deterministic steps without guidance, each as far as K guided steps of the teacher."""

    name = "leap"

    class Config(distill.Method.Config):
        """Settings of leap distillation."""

        num_inference_steps: int = Field(4, ge=1, le=50)
        """N, the steps of the student."""
        teacher_steps: int = Field(4, ge=1, le=100)
        """K, the teacher's steps in one of the student's."""
        guidance_scale: float = Field(5.0, ge=1, le=100)
        """Guidance scale of the teacher, uncond + g (cond - uncond), which the student has built in."""

    _timestep_grid = None

    @classmethod
    def roles(cls, config, setup):
        return [distill.Role("teacher"), distill.Role("student", trains=setup.model_type)]

    @classmethod
    def requires(cls, config, setup):
        return distill.Requirements(finite_snr=True)

    def updates(self, context, batch, step):
        config, rng, x_0 = self.config, context.rng, batch.latents  # (B, C, h, w)
        timesteps = self._on_device(context)
        start = config.teacher_steps * rng.integers("leap", config.num_inference_steps)  # (B,)
        t = timesteps.times[start]
        x_t = context.schedule.add_noise(x_0, rng.randn("noise", x_0.shape[1:]).to(x_0.dtype), t)
        with torch.no_grad():
            target = self._target(context, timesteps, start, x_t, batch.cond)
        output = context.predict("student", x_t, t, batch.cond).x0
        weight = truncated_snr(context.schedule.log_snr(t)).to(output.dtype)
        losses = weight * (output - target).square().flatten(1).mean(1)
        yield distill.Update("student", losses.mean(), per_sample=losses.detach(), t=t)

    def _target(self, context, timesteps, start, x_t, cond):
        """x_0* of the teacher's steps from `x_t`, which lies at the point `start` (B,) of the timestep grid."""
        scale = torch.full(start.shape, self.config.guidance_scale, device=start.device)
        x, point = x_t, start
        for _ in range(self.config.teacher_steps):
            x = step_to(context.predict_guided(x, timesteps.times[point], cond, scale), timesteps.at(point + 1))
            point = point + 1
        return data_of_step(x_t, x, start=timesteps.at(start), end=timesteps.at(point))

    def _on_device(self, context):
        if self._timestep_grid is None:  # made once: anew it would be copied to the device at every step
            steps = self.config.num_inference_steps * self.config.teacher_steps
            self._timestep_grid = trailing_timesteps(context.schedule, steps).to(context.device)
        return self._timestep_grid

    def sampler(self, schedule, *, num_inference_steps=None, guidance_scale=None):
        return deterministic_sampler(schedule, num_inference_steps or self.config.num_inference_steps, 0.0)


@distill.hookimpl
def register_methods():
    return [Leap]
