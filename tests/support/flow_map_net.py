"""Networks that know of a second time, on data whose flow map is known in closed form or by integration.

One number per sample, float64. Derivatives by x, t and r exist everywhere (but for the kinks of a table of betas).
"""

from __future__ import annotations

import copy

import torch
from distill.core.diffusion import Schedule, append_dims
from distill.core.plugin_api.family import Capabilities
from distill.core.testing import gaussian
from distill.core.testing.gaussian import GaussianFamily, Q
from distill.core.testing.smooth import splines
from distill.distill_methods.meanflow import flow_time
from torch import Tensor, nn

from . import mixture

REACH = 5.0
"""Of the splines over x, in standard deviations of the noised data."""


# -- what is exact for N(mean, q^2) -----------------------------------------------------------------------------------


def spread(tau: Tensor) -> Tensor:
    """S, the standard deviation of z at tau."""
    return ((1 - tau) ** 2 * Q**2 + tau**2).sqrt()


def gaussian_u(z: Tensor, tau: Tensor, rho: Tensor, mean: Tensor) -> Tensor:
    """(z_tau - z_rho) / (tau - rho) without a difference that cancels; all of shape (B, 1), also at rho = tau."""
    slope = (tau + rho) - Q**2 * (2 - tau - rho)  # (S_tau^2 - S_rho^2) / (tau - rho)
    return slope * (z - (1 - tau) * mean) / (spread(tau) * (spread(tau) + spread(rho))) - mean


def gaussian_du(z: Tensor, tau: Tensor, rho: Tensor, mean: Tensor) -> Tensor:
    """d/dtau of :func:`gaussian_u` along the trajectory, where (z - (1 - tau) mean) / S stays what it is."""
    s, s_rho = spread(tau), spread(rho)
    slope = (tau + rho) - Q**2 * (2 - tau - rho)
    s_dot = (tau - Q**2 * (1 - tau)) / s
    quantile = (z - (1 - tau) * mean) / s
    return quantile * ((1 + Q**2) * (s + s_rho) - slope * s_dot) / (s + s_rho) ** 2


class Splines(nn.Module):
    """Sums of products of quadratic B-splines of each input in [-1, 1]: smooth and yet local; starts at zero.

    Args:
        cells: Equal cells of each input.
        outputs: Numbers per sample.
    """

    def __init__(self, cells: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.cells = cells
        self.weight = nn.Parameter(torch.zeros(outputs, *(number + 2 for number in cells), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        names = "ijk"[: inputs.shape[1]]
        bases = [splines(column, number) for column, number in zip(inputs.unbind(1), self.cells, strict=True)]
        return torch.einsum(f"o{names}," + ",".join(f"b{name}" for name in names) + "->bo", self.weight, *bases)


class ExactNetwork(nn.Module):
    """A student that is the flow map of N(scale c, q^2) already, in any parametrisation.

    Args:
        schedule: The path.
        kind: Parametrisation of the output.
        scale: Of the guidance that is built in; None: it is told w.
    """

    def __init__(self, schedule: Schedule, kind: str, scale: float | None) -> None:
        super().__init__()
        self.schedule, self.kind, self.scale = schedule, kind, scale
        self.register_buffer("unit", schedule.network_time(torch.ones(1, dtype=torch.float64)))
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, c: Tensor, r: Tensor, w: Tensor | None) -> Tensor:
        t, r = time.double() / self.unit, r.double() / self.unit
        tau, rho = (append_dims(flow_time(self.schedule, times), x) for times in (t, r))
        alpha, sigma = self.schedule.coefficients(t, x)
        scale = self.scale if w is None else w[:, None] + 1
        z = x / (alpha + sigma)
        u = self.factor * gaussian_u(z, tau, rho, scale * c)
        x_0, eps = z - tau * u, z + (1 - tau) * u
        return {"sample": x_0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "flow": u}[self.kind]


# -- what learns ------------------------------------------------------------------------------------------------------


class FlowMapNetwork(nn.Module):
    """The perfect output of `data` at (x, t), plus a correction of (x, t, r) that starts at zero.

    Args:
        schedule: The path.
        kind: Parametrisation of the output.
        data: ``gaussian`` (the correction is affine in x and c) or ``mixture`` (any smooth function, for one prompt).
        second_time: Whether there is a correction at all; without, it is the teacher.
    """

    def __init__(self, schedule: Schedule, kind: str, data: str, *, second_time: bool = False) -> None:
        super().__init__()
        self.schedule, self.kind, self.data, self.second_time = schedule, kind, data, second_time
        self.register_buffer("unit", schedule.network_time(torch.ones(1, dtype=torch.float64)))
        if second_time:
            self.correction = Splines((5, 5), 2) if data == "gaussian" else Splines((40, 8, 8), 1)

    def forward(self, x: Tensor, time: Tensor, c: Tensor, r: Tensor | None = None) -> Tensor:
        assert (r is not None) == self.second_time, "told r if and only if there is an input for it"
        x, t = x.double(), time.double() / self.unit
        perfect = gaussian.raw_output if self.data == "gaussian" else mixture.raw_output
        output = perfect(self.kind, self.schedule, x, t, c)
        if r is None:
            return output
        times = [2 * flow_time(self.schedule, each)[:, None] - 1 for each in (t, r.double() / self.unit)]
        if self.data == "gaussian":
            a, b = self.correction(torch.cat(times, dim=1)).chunk(2, dim=1)
            return output + a * x + b * c
        alpha, sigma = self.schedule.coefficients(t, x)
        place = (x - alpha * (c + mixture.MEAN)) / (alpha**2 * mixture.VARIANCE + sigma**2).sqrt() / REACH
        return output + self.correction(torch.cat([place, *times], dim=1))


class FlowMapFamily(GaussianFamily):
    """Prompts are numbers; the unconditional is 0.

    Args:
        schedule: The path.
        kind: Parametrisation of the networks.
        data: See :class:`FlowMapNetwork`.
        exact: A scale: students are the flow map at that guidance from the start (told w where they have an input).
    """

    name = "flow_map"
    capabilities = Capabilities(guidance_embedding=True, second_time=True)

    def __init__(self, schedule: Schedule, kind: str, data: str = "gaussian", *, exact: float | None = None) -> None:
        super().__init__(schedule, kind, torch.zeros(1))
        self._data, self._exact = data, exact

    def load_network(self):
        return FlowMapNetwork(self._schedule, self._kind, self._data)

    def student_network(self, teacher, *, guidance_embedding, second_time=False):
        if self._exact is not None:
            return ExactNetwork(self._schedule, self._kind, None if guidance_embedding else self._exact)
        if not second_time:
            return copy.deepcopy(teacher)
        return FlowMapNetwork(self._schedule, self._kind, self._data, second_time=True)

    def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):
        if isinstance(network, ExactNetwork):
            return network(x_t, time, cond["mean"], second_time, guidance)
        assert guidance is None
        return network(x_t, time, cond["mean"], second_time)
