"""Samples of a student by the scheduler that its method names, on one number per sample."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diffusion.schedule import FlowSchedule, Schedule
from ..diffusion.second_time import SCHEDULER
from .checks import expect
from .gaussian import Q
from .paths import NOISE

if TYPE_CHECKING:
    from ..diffusion.sampler import Sampler
    from ..plugin_api.context import Context


def build_scheduler(sampler: Sampler, schedule: Schedule, kind: str) -> Any:
    """Build the sampler's scheduler for the closed-form family. Raises ConformanceError where it cannot be made."""
    import diffusers

    if sampler.scheduler == SCHEDULER:
        from ..diffusion.flow_map import FlowMapScheduler

        found: Any = FlowMapScheduler
    else:
        found = getattr(diffusers, sampler.scheduler, None)
    expect(
        found is not None,
        f"sampler() names the scheduler {sampler.scheduler!r}, which diffusers {diffusers.__version__} has not",
        "name one of its scheduler classes",
    )
    accepted = set(inspect.signature(found.__init__).parameters) - {"self"}
    unknown = ", ".join(sorted(set(sampler.config) - accepted))
    expect(not unknown, f"sampler() gives {sampler.scheduler} {unknown}, which it does not take", "leave it out")
    own: dict[str, Any] = {"prediction_type": kind, "clip_sample": False, "set_alpha_to_one": True}
    own |= {"shift": schedule.shift} if isinstance(schedule, FlowSchedule) else NOISE
    own |= {"rescale_betas_zero_snr": not isinstance(schedule, FlowSchedule) and schedule.zero_terminal_snr}
    return found(**{key: value for key, value in own.items() if key in accepted} | dict(sampler.config))


@torch.no_grad()
def sample(context: Context, role: str, sampler: Sampler, noise: Tensor, *, mean: float) -> Tensor:
    """Return samples (B, 1) made by the sampler from `noise`, with the network of `role`, for the prompt `mean`.

    Args:
        context: The context of the networks.
        role: The role whose network is sampled.
        sampler: As the method names it.
        noise: Standard normal, shape (B, 1).
        mean: The prompt.
    """
    scheduler = build_scheduler(sampler, context.schedule, context.prediction_type)
    call, given = dict(sampler.call), {}
    for key in ("sigmas", "timesteps"):
        if key in call:
            given[key] = call.pop(key)
    scheduler.set_timesteps(**(given or {"num_inference_steps": sampler.num_inference_steps}))
    step_takes = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {key: value for key, value in call.items() if key in step_takes}
    extra |= {"generator": torch.Generator().manual_seed(0)} if "generator" in step_takes else {}
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        output = _predict(context, role, sampler, scheduler, scaled, timestep, mean)
        x = scheduler.step(output, timestep, x, return_dict=False, **extra)[0]
    return x


def _predict(
    context: Context, role: str, sampler: Sampler, scheduler: Any, x: Tensor, timestep: Tensor, mean: float
) -> Tensor:
    runtime, size = context._runtime, len(x)
    cond = {"mean": torch.full((size, 1), mean, dtype=torch.float64)}
    with runtime.networks.use(role) as network:
        told, second_time = getattr(network, "told", False), None
        if getattr(network, "second_time", False):
            second_time = torch.full((size,), float(scheduler.pair[1]), dtype=torch.float64)
        w = torch.full((size,), sampler.guidance_scale - 1, dtype=torch.float64) if told else None
        time = torch.full((size,), float(timestep), dtype=torch.float64)
        return runtime.family.predict(network, x, time, cond, guidance=w, second_time=second_time)


def quantile_noise(size: int) -> Tensor:
    """Return standard normal noise (B, 1): the middles of equal shares, in an arbitrary order."""
    shares = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return torch.special.ndtri(shares)[order, None]


def distance_to_answer(samples: Tensor, *, mean: float) -> tuple[float, float]:
    """Return (error, guidance): the distance of samples (B, 1) to N(g c, q^2) with the g that fits best, and that g.

    A guided teacher of this data is N(g c, q^2). The distance is the root mean square between quantiles (Wasserstein-2)
    in units of q.
    """
    values = samples.double()[:, 0].sort().values
    found = values.mean()
    expected = found + Q * quantile_noise(len(values))[:, 0].sort().values
    return float((values - expected).square().mean().sqrt() / Q), float(found / mean)
