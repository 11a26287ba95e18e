"""Networks that know of a second time, on data whose flow map is known: the perfect teacher plus a smooth correction.

One number per sample, float64. Derivatives by x, t and r exist everywhere (but for the kinks of a table of betas).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from distill.core.diffusion import Schedule
from distill.core.family import Capabilities
from distill.core.random import Draws, generator
from distill.distill_methods.meanflow import flow_time
from torch import Tensor, nn

from . import gaussian, mixture
from .gaussian import Q, GaussianFamily

HIDDEN = 48
CELLS = 6


class FlowMapNetwork(nn.Module):
    """The perfect output of `data` at (x, t), plus a correction of (x, t, r, c) that starts at zero.

    Args:
        schedule: The path.
        kind: Parametrisation of the output.
        data: ``gaussian`` (the correction is affine in x and c) or ``mixture`` (it is any smooth function).
        second_time: Whether there is a correction at all; without, it is the teacher.
        guidance: Whether the correction is also told w (gaussian only).
    """

    def __init__(
        self, schedule: Schedule, kind: str, data: str, *, second_time: bool = False, guidance: bool = False
    ) -> None:
        super().__init__()
        self.schedule, self.kind, self.data, self.second_time = schedule, kind, data, second_time
        self.register_buffer("unit", schedule.network_time(torch.ones(1, dtype=torch.float64)))
        self.guidance = guidance
        if second_time:
            self.correction = Splines(3 if guidance else 2, 2) if data == "gaussian" else smooth(4, 1)

    def forward(self, x: Tensor, time: Tensor, c: Tensor, r: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        assert (r is not None) == self.second_time, "told r if and only if there is an input for it"
        assert (w is not None) == self.guidance, "told w if and only if there is an input for it"
        x, t = x.double(), time.double() / self.unit
        perfect = gaussian.raw_output if self.data == "gaussian" else mixture.raw_output
        output = perfect(self.kind, self.schedule, x, t, c)
        if r is None:
            return output
        tau, rho = flow_time(self.schedule, t), flow_time(self.schedule, r.double() / self.unit)
        times = [2 * tau[:, None] - 1, 2 * rho[:, None] - 1, *([] if w is None else [w[:, None] / 4])]
        if self.data == "gaussian":
            a, b = self.correction(torch.cat(times, dim=1)).chunk(2, dim=1)
            return output + a * x + b * c
        return output + self.correction(torch.cat([x, c, *times], dim=1))


class Splines(nn.Module):
    """Sums of products of quadratic B-splines of each input in [-1, 1]: smooth and yet local; starts at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, *(CELLS + 2,) * inputs, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        names = "ijk"[: inputs.shape[1]]
        bases = [splines(column) for column in inputs.unbind(1)]
        return torch.einsum(f"o{names}," + ",".join(f"b{name}" for name in names) + "->bo", self.weight, *bases)


def splines(x: Tensor) -> Tensor:
    """The quadratic B-splines of CELLS equal cells of [-1, 1] at `x` (B,): shape (B, CELLS + 2)."""
    place = (x + 1) / 2 * CELLS
    u = (place[:, None] - (torch.arange(CELLS + 2) - 0.5)).abs()  # distance from the middle of each
    return torch.where(u < 0.5, 0.75 - u**2, 0.5 * (1.5 - u).clamp(min=0) ** 2)


def smooth(inputs: int, outputs: int) -> nn.Sequential:
    """A small network of tanh that starts at zero, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs)
        ).double()
    last: Any = layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return layers


class FlowMapFamily(GaussianFamily):
    """Prompts are numbers; the unconditional is 0."""

    name = "flow_map"
    capabilities = Capabilities(guidance_embedding=True, second_time=True)

    def __init__(self, schedule: Schedule, kind: str, data: str = "gaussian") -> None:
        super().__init__(schedule, kind, torch.zeros(1))
        self._data = data

    def load_network(self):
        return FlowMapNetwork(self._schedule, self._kind, self._data)

    def student_network(self, teacher, *, guidance_embedding, second_time=False):
        if not second_time:
            return copy.deepcopy(teacher)
        return FlowMapNetwork(
            self._schedule, self._kind, self._data, second_time=True, guidance=guidance_embedding
        )

    def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):
        return network(x_t, time, cond["mean"], second_time, guidance)


def gaussian_map(schedule: Schedule, x: Tensor, t: Tensor, r: Tensor, mean: Tensor) -> Tensor:
    """The exact map of N(mean, q^2) from t to r, (B,) each: the distance from the mean keeps its quantile."""
    (a, s), (a_r, s_r) = schedule.coefficients(t, x), schedule.coefficients(r, x)
    return a_r * mean + ((a_r**2 * Q**2 + s_r**2) / (a**2 * Q**2 + s**2)).sqrt() * (x - a * mean)


class QuickDraws(Draws):
    """Draws of a whole batch at once: 256 generators a step would take longer than the training itself."""

    def _at_once(self, name: str) -> tuple[int, torch.Generator]:
        return len(self.positions), generator(self.seed, name, self.step)

    def randn(self, name, shape):
        size, g = self._at_once(name)
        return torch.randn(size, *shape, generator=g)

    def uniform(self, name, low=0.0, high=1.0):
        size, g = self._at_once(name)
        return torch.rand(size, generator=g, dtype=torch.float64) * (high - low) + low
