"""The closed-form Gaussian family with students of any kind: with a guidance input, a second time, inner features.

The network is the perfect denoiser of N(c, q^2), of any prediction type, plus a correction that starts at zero

    output = perfect(x, t, c) + a(t, r) x + b(t, r) c + d(t, r) (w / 10) c + e(t, r)

with splines a, b, d, e of the time: smooth, so that every time profits from a step at another. For this data every
consistency function, flow map and few-step generator is affine in (x, c), hence within reach.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..diffusion.schedule import Schedule
from ..diffusion.solvers import trailing_timesteps
from ..plugin_api.batch import Batch, Conditioning, Trajectories
from ..plugin_api.context import Context
from ..plugin_api.family import Capabilities
from ..plugin_api.family_parts import FIRST_HALF, Blocks
from . import gaussian
from .gaussian import GaussianFamily, Q
from .rng import BatchedRngStreams

CELLS = 8
"""Number of cells of the splines over the time."""
W_UNIT = 10.0
"""Divisor of the paper's w."""


def splines(x: Tensor, cells: int) -> Tensor:
    """Return the quadratic B-splines of equal cells of [-1, 1] at `x` (B,): shape (B, cells + 2)."""
    place = (x + 1) / 2 * cells
    u = (place[:, None] - (torch.arange(cells + 2) - 0.5)).abs()  # distance from the middle of each
    return torch.where(u < 0.5, 0.75 - u**2, 0.5 * (1.5 - u).clamp(min=0) ** 2)


def products(positions: Sequence[Tensor], cells: int) -> Tensor:
    """Return products of the splines of each position in [-1, 1], (B,) each: (B, (cells + 2)^len(positions))."""
    found = splines(positions[0], cells)
    for place in positions[1:]:
        found = (found[:, :, None] * splines(place, cells)[:, None]).flatten(1)
    return found


class SmoothNetwork(nn.Module):
    """The network of the module's equation.

    Args:
        schedule: The noise schedule.
        kind: Prediction type of the output.
        told: Whether it takes w.
        second_time: Whether it takes r.
    """

    unit: Tensor
    start: Tensor

    def __init__(self, schedule: Schedule, kind: str, *, told: bool = False, second_time: bool = False) -> None:
        super().__init__()
        self.schedule, self.kind, self.told, self.second_time = schedule, kind, told, second_time
        self.register_buffer("unit", schedule.network_time(torch.ones(1, dtype=torch.float64)))
        self.correction = nn.Linear((CELLS + 2) ** (2 if second_time else 1), 4, bias=False, dtype=torch.float64)
        # not zeros, so that whatever touches the weights of a teacher shows
        self.register_buffer("start", torch.full_like(self.correction.weight, 0.5))
        self.correction.weight.data.copy_(self.start)

    def forward(
        self, x: Tensor, time: Tensor, c: Tensor, *, w: Tensor | None = None, r: Tensor | None = None
    ) -> Tensor:
        """Return (B, D) for x (B, D), the time inputs time and r (B,), c (B, 1) and w (B,)."""
        if (w is not None) != self.told:
            raise ValueError("pass the guidance to a network that takes it, and to no other")
        if (r is not None) != self.second_time:
            raise ValueError("pass the second time to a network that takes it, and to no other")
        x, times = x.double(), [each.double() / self.unit for each in (time, r) if each is not None]
        positions = [2 * self._share(t) - 1 for t in times]
        basis = products(positions, CELLS)
        a, b, d, e = (self.correction(basis) - nn.functional.linear(basis, self.start)).split(1, dim=1)
        told = 0.0 if w is None else d * w.double()[:, None] / W_UNIT
        return gaussian.raw_output(self.kind, self.schedule, x, times[0], c) + a * x + (b + told) * c + e

    def add_adapter(self, config: Any, *, adapter_name: str) -> None:
        """Put a LoRA on the correction, as networks of diffusers do it."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)

    def _share(self, t: Tensor) -> Tensor:
        """Return the share of noise at time t, from 0 to 1."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return sigma / (alpha + sigma)


class SmoothFamily(GaussianFamily):
    """The family of the module's network. Students support every request of a method (adapters take no second time).

    Args:
        schedule: The noise schedule.
        kind: Prediction type of the networks.
    """

    name = "closed-form"
    capabilities: ClassVar[Capabilities] = Capabilities(
        guidance_embedding=True, second_time=True, features=True, pixels=True
    )
    lora_targets: ClassVar[tuple[str, ...]] = ("correction",)

    def __init__(self, schedule: Schedule, kind: str) -> None:
        super().__init__(schedule, kind, torch.zeros(1))

    def load_network(self) -> nn.Module:
        """Return the perfect network."""
        return SmoothNetwork(self._schedule, self._kind)

    def student_network(
        self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False, smaller: bool = False
    ) -> nn.Module:
        """Return the perfect network with the inputs asked for."""
        if not guidance_embedding and not second_time:
            return copy.deepcopy(teacher).requires_grad_(True)
        return SmoothNetwork(self._schedule, self._kind, told=guidance_embedding, second_time=second_time)

    def predict(
        self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, *, guidance: Tensor | None = None,
        second_time: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the network's output."""
        return network(x_t, time, cond["mean"], w=guidance, r=second_time)

    def features(
        self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, *, blocks: Blocks = FIRST_HALF
    ) -> list[Tensor]:
        """Return eight bumps over x, and one feature that is the network's output: (B, 9, 1, 1)."""
        centres = torch.linspace(-2, 2, 8, dtype=torch.float64)
        bumps = torch.exp(-((x_t.double() - centres) ** 2))
        return [torch.cat([bumps, network(x_t, time, cond["mean"])], dim=1)[:, :, None, None]]

    def feature_channels(self, network: nn.Module, *, blocks: Blocks = FIRST_HALF) -> list[int]:
        """Return nine channels."""
        return [9]

    def block_names(self, network: nn.Module) -> list[str]:
        """Return the name of the one block."""
        return ["correction"]


class QuickContext(Context):
    """A context that draws for a whole batch at once."""

    def at(self, step: int, positions: Sequence[int]) -> Context:
        """Return the same context for another micro-batch."""
        context = QuickContext(self._runtime, step=step, positions=positions)
        context.rng = BatchedRngStreams(self._runtime.seed, step, positions)
        return context


def smooth_batch(schedule: Schedule, step: int, size: int, *, mean: float, images: bool, points: int = 0) -> Batch:
    """Return data of the prompt `mean`; without latents unless `images`, with trajectories of the teacher where asked.

    A trajectory has twice as many points as are needed, so that a method must choose its own.
    """
    g = torch.Generator().manual_seed(step)
    latents = mean + Q * torch.randn(size, 1, generator=g, dtype=torch.float64)
    cond = {"mean": torch.full((size, 1), mean, dtype=torch.float64)}
    keys, positions = tuple(f"set/{i}" for i in range(size)), tuple(range(size))
    trajectories = exact_trajectories(
        schedule, torch.randn(size, 1, generator=g, dtype=torch.float64), cond, 2 * points
    )
    return Batch(latents if images else None, cond, keys, positions, latent_shape=(1,), trajectories=trajectories)


def exact_trajectories(schedule: Schedule, noise: Tensor, cond: Conditioning, points: int) -> Trajectories | None:
    """Return the teacher's exact trajectories from `noise` (B, 1); None for no points."""
    if not points:
        return None
    times, mean = trailing_timesteps(schedule, points).times, cond["mean"]
    full = times[:, None].expand(-1, len(noise))
    path = torch.stack([gaussian.gaussian_map(schedule, noise, full[0], t, mean) for t in full], dim=1)
    a, s = schedule.coefficients(full[0], noise)
    data = mean + Q * (noise - a * mean) / (a**2 * Q**2 + s**2).sqrt()
    return Trajectories(path, times, data, cond)
