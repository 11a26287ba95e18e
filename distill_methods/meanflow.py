r"""Mean flows: the student learns the average velocity between any two times, so that it can use any number of steps.

In flow coordinates a noised point is z = (1 - tau) x_0 + tau eps, and the teacher's guided ODE is dz/dtau = v. The map
from tau to rho < tau along one trajectory, and the average velocity u that expresses it, are

    f(z_tau, tau, rho) = z_tau - (tau - rho) u(z_tau, tau, rho),    u = 1 / (tau - rho) int_rho^tau v(z_s, s) ds

and differentiating (tau - rho) u by tau, along the trajectory and with rho fixed, gives the equation of u:

    u = v - (tau - rho) d/dtau u,    d/dtau = v d/dz + partial/partial tau

One training step:

    tau >= rho: two draws of sigmoid(N(time_mean, time_std^2)) in order, or rho = tau for a share of the samples
    z_tau  from data;  v = eps^ - x0^ of the teacher with guidance scale w ~ U[w_min, w_max]
    u_tgt  = v - (tau - rho) JVP(u_theta; (z_tau, tau, rho), (v, 1, 0))           no gradient
    L      = s / sg(s + c)^p,   s = || u_theta(z_tau, tau, rho) - u_tgt ||^2      summed over a sample's elements

This is MeanFlow with the velocity of a teacher in place of eps - x_0 (arXiv 2505.13447, eq. 10 and 22), which is
AYF-EMD (arXiv 2506.14603): dividing by the error's norm is the latter's tangent normalisation at p = 1/2, and letting
the JVP's term grow over the first steps is its tangent warm-up.

Every schedule x_t = alpha_t x_0 + sigma_t eps is such a flow in z = x_t / (alpha_t + sigma_t) and

    tau = sigma_t / (alpha_t + sigma_t),    dt/dtau = (alpha_t + sigma_t)^2 / (alpha_t sigma_t' - sigma_t alpha_t')

so u is eps - x_0 of the network's prediction at (x_t, t), with r as a second input. At r = t the student starts as the
teacher. And since z is linear in (x_0, eps), z_rho = z_tau - (tau - rho) u is x_r = alpha_r x_0 + sigma_r eps in the
schedule's own coordinates: the sampler is DDIM, of a network that knows the time at which its step ends.

Derivatives are taken along the *teacher's* trajectory in the schedule's time: the tangent (dx_t/dt, 1, 0) dt/dtau.

References:
    Geng et al., Mean Flows for One-step Generative Modeling, arXiv 2505.13447.
    Sabour et al., Align Your Flow: Scaling Continuous-Time Flow Map Distillation, arXiv 2506.14603.
    Boffi et al., Flow Map Matching, arXiv 2406.07507.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.diffusion import Schedule, append_dims
from ..core.diffusion.guidance import GuidanceRange, LowestGuidance, embedded_scale
from ..core.diffusion.sampler import Sampler
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update


def flow_time(schedule: Schedule, t: Tensor) -> Tensor:
    """Return tau = sigma_t / (alpha_t + sigma_t), float64, shape of `t`: 0 is data, 1 is noise."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return sigma / (alpha + sigma)


def time_of_flow_time(schedule: Schedule, tau: Tensor) -> Tensor:
    """Return the inverse of :func:`flow_time`, clamped to the schedule's times, float64, shape of `tau`."""
    return schedule.time_of_log_snr(2 * ((1 - tau).log() - tau.log())).clamp(0.0, schedule.t_max)


def flow_time_speed(schedule: Schedule, t: Tensor) -> Tensor:
    """Return dt/dtau at times `t`, float64, shape of `t`."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (alpha + sigma) ** 2 / (alpha * schedule.sigma_dot(t) - sigma * schedule.alpha_dot(t))


def truncated_logit_normal(shares: Tensor, *, mean: float, std: float, low: Tensor, high: Tensor) -> Tensor:
    """Return quantiles of sigmoid(N(mean, std^2)) truncated to [low, high], float64.

    Draws beyond the ends are not moved onto them: the semi-gradient of u + (tau - rho) u' = v contracts where the
    density of tau grows no faster than tau - rho, and a point mass at the end breaks that.

    Args:
        shares: Levels of the quantiles in [0, 1), any shape; the result has the same.
        mean: Mean of the normal.
        std: Standard deviation of the normal.
        low: Lower end in (0, 1).
        high: Upper end in (0, 1).
    """
    below, above = (torch.special.ndtr((torch.logit(end) - mean) / std) for end in (low, high))
    return torch.sigmoid(mean + std * torch.special.ndtri(below + (above - below) * shares)).clamp(low, high)


def adaptive_weight(squared: Tensor, *, power: float, floor: float) -> Tensor:
    """Return 1 / (s + c)^p, detached, shape (B,): outliers count less (arXiv 2505.13447).

    Args:
        squared: s, the squared error of each sample summed over its elements, shape (B,).
        power: p.
        floor: c, in squared latent units.
    """
    return (squared.detach() + floor) ** -power


class MeanFlow(Method):
    """Mean-flow distillation: a flow map for any number of steps, without guidance, as a LoRA or a full model."""

    name = "meanflow"
    guidance_keys = ("w_min", "w_max")

    class Config(GuidanceRange):
        """Settings of mean-flow distillation."""

        w_min: LowestGuidance = 5.0
        w_max: float = Field(5.0, ge=0, le=100)
        """Upper end of that range. A LoRA learns its middle; a full model takes w as an input if the ends differ."""
        equal_share: float = Field(0.25, ge=0, lt=1)
        """Share of the samples whose two times are equal: they learn the guided velocity itself, as an anchor."""
        time_mean: float = Field(-0.4, ge=-5, le=5)
        """Mean of the normal that logit(tau) is drawn from; on a flow with shift m, log(m) more follows its grid."""
        time_std: float = Field(1.0, gt=0, le=5)
        """Standard deviation of that normal; larger ones draw the ends, on which few steps depend, more often."""
        adaptive_power: float = Field(1.0, ge=0, le=2)
        """p of the loss s / (s + c)^p; 0: plain squared error, 0.5: normalised tangents, 1: the paper's."""
        adaptive_floor: float = Field(0.01, gt=0, le=1e6)
        """c of the loss, in squared latent units summed over a sample."""
        tangent_warmup_steps: int = Field(0, ge=0)
        """Optimizer steps over which the derivative's term grows from 0 to 1; until then guidance is learnt first."""
        derivative: Literal["exact", "difference"] = "difference"
        """difference: two calls of the network; exact: its forward-mode differentiation, which follows the jitter of
        the timestep's embedding too, and needs kernels that have it."""
        difference_step: float = Field(0.02, gt=0, le=0.1)
        """h of the central difference, in tau; rounding errors are divided by it."""
        jvp_precision: Literal["float32", "mixed"] = "float32"
        """Arithmetic of the derivative: float32 whatever mixed_precision says, or mixed, the run's own: faster, and in
        bfloat16 wrong by a sixth of its size at h = 0.02."""
        num_inference_steps: int = Field(4, ge=1, le=50)
        """Steps that the student is validated and exported with unless the run says otherwise."""

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the roles: the student takes a second time; a full one takes w as well where w is a range."""
        full, embedded = setup.model_type == "full", config.takes_guidance(setup.model_type)
        trains = "full" if full else "lora"
        return [Role("teacher"), Role("student", trains=trains, guidance_embedding=embedded, second_time=True)]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require images; a second time; equal passes for value and derivative; a finite x_0 at all times."""
        return Requirements(
            guidance_embedding=config.takes_guidance(setup.model_type),
            second_time=True,
            zero_dropout=True,
            forward_ad=config.derivative == "exact",
            finite_snr=True,
        )

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the student's update, algorithm 1 of arXiv 2505.13447 with the teacher's guided velocity."""
        assert batch.latents is not None
        config, schedule, rng, x_0 = self.config, context.schedule, context.rng, batch.latents
        t, r = self._times(context)
        eps = rng.randn("noise", x_0.shape[1:]).to(x_0.dtype)
        x_t = schedule.add_noise(x_0, eps, t)
        scale = rng.uniform("w", *config.scales)
        w = scale - 1 if config.takes_guidance(self.setup.model_type) else None

        def u_theta(x: Tensor, t: Tensor) -> Tensor:
            return context.predict("student", x, t, batch.cond, guidance=w, r=r).as_type("flow")

        with torch.no_grad():
            guided = context.predict_guided(x_t, t, batch.cond, scale, guided=config.guided)
            speed = flow_time_speed(schedule, t)
            tangents = (append_dims(speed, x_t) * guided.velocity, speed)
            derivative = context.jvp(
                u_theta, (x_t, t), tangents, step=self._difference_step, precision=config.jvp_precision
            )
            interval = (flow_time(schedule, t) - flow_time(schedule, r)) * self._warmup(step)
            target = guided.as_type("flow") - append_dims(interval, x_t) * derivative
        error = ((u_theta(x_t, t) - target) ** 2).flatten(1)

        squared = error.sum(1)
        losses = squared * adaptive_weight(squared, power=config.adaptive_power, floor=config.adaptive_floor)
        mean = error.detach().mean(1)
        yield Update("student", losses.mean(), {"velocity_error": mean.mean()}, per_sample=mean, t=t)

    def _times(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return t >= r (B,), float64, in the schedule's units; exactly equal for `equal_share` of the samples."""
        config, schedule, rng = self.config, context.schedule, context.rng
        shares = torch.stack([rng.uniform(f"time-{number}") for number in range(2)], dim=1)
        ends = flow_time(schedule, torch.tensor([0.0, schedule.t_max], dtype=torch.float64, device=shares.device))
        margin = self._difference_step or 0.0  # both sides of a difference must lie inside
        low, high = ends[0] + margin, ends[1] - margin
        tau = truncated_logit_normal(shares, mean=config.time_mean, std=config.time_std, low=low, high=high)
        times = time_of_flow_time(schedule, tau)
        t, r = times.amax(1), times.amin(1)
        equal = rng.uniform("equal") < config.equal_share
        return t, torch.where(equal, t, r)

    @property
    def _difference_step(self) -> float | None:
        return self.config.difference_step if self.config.derivative == "difference" else None

    def _warmup(self, step: int) -> float:
        steps = self.config.tangent_warmup_steps
        return 1.0 if steps == 0 else min(1.0, step / steps)

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return deterministic steps between any times, guidance off.

        A student that takes w gets the guidance asked for, or the middle of its range where that lies outside.
        """
        steps = num_inference_steps or self.config.num_inference_steps
        told = self.config.takes_guidance(self.setup.model_type)
        guidance = embedded_scale(guidance_scale, self.config.scales) if told else 0.0
        return Sampler("FlowMapScheduler", {}, steps, guidance)

    def notices(self) -> list[str]:
        """Return the effect of a guidance range on a student that does not take w."""
        low, high = self.config.scales
        if low == high:
            line = f"meanflow: the teacher's guidance scale is {low:g}, and the student has it built in"
        elif self.config.takes_guidance(self.setup.model_type):
            line = f"meanflow: the student takes a guidance scale of {low:g} to {high:g} as an input"
        else:
            line = (
                f"meanflow: the student has no input for the guidance scale, drawn from {low:g} to {high:g}: it learns "
                f"the one of {(low + high) / 2:g}, and the range only adds noise"
            )
        return [line]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [MeanFlow]
