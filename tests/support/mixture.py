"""A family whose teacher is known in closed form and not linear: data sum_k w_k N(c + m_k, q_k^2) per prompt c.

One number per sample, float64. The network is the perfect denoiser, exact at every time, plus a table over (prompt,
time, x) that starts at zero: capacity enough for any consistency function or flow map of this data. Between its times
and its knots the table is linear, so that derivatives by x, t and r exist.
"""

from __future__ import annotations

import copy

import torch
from distill.core.diffusion import Schedule
from distill.core.plugin_api.batch import Batch
from distill.core.plugin_api.family import Capabilities
from distill.core.testing.gaussian import GaussianFamily
from torch import Tensor, nn

WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.8], dtype=torch.float64)
WIDTHS = torch.tensor([0.3, 0.4], dtype=torch.float64)
MEAN = (WEIGHTS * MEANS).sum()
VARIANCE = (WEIGHTS * (WIDTHS**2 + MEANS**2)).sum() - MEAN**2
NUM_KNOTS, REACH = 97, 6.0
"""Knots of a table over x, in standard deviations of the noised data from -REACH to REACH."""


def parts(alpha: Tensor, sigma: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The perfect (x_0, eps) at x = alpha x_0 + sigma eps; all of shape (B, 1), alpha and sigma may be floats.

    With v_k = alpha^2 q_k^2 + sigma^2 and responsibilities r_k ~ w_k N(x; alpha (c + m_k), v_k):

        x_0 = sum_k r_k [c + m_k + alpha q_k^2 (x - alpha (c + m_k)) / v_k],   eps = sum_k r_k sigma (x - ...) / v_k
    """
    v = alpha**2 * WIDTHS**2 + sigma**2
    gap = x - alpha * (c + MEANS)
    r = torch.softmax(WEIGHTS.log() - v.log() / 2 - gap**2 / (2 * v), dim=1)
    x_0 = (r * (c + MEANS + alpha * WIDTHS**2 * gap / v)).sum(1, keepdim=True)
    return x_0, (r * sigma * gap / v).sum(1, keepdim=True)


def raw_output(kind: str, schedule: Schedule, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """The perfect network of a parametrisation, (B, 1)."""
    alpha, sigma = schedule.coefficients(t, x)
    x_0, eps = parts(alpha, sigma, x, c)
    return {"sample": x_0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "flow": eps - x_0}[kind]


def score(schedule: Schedule, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Gradient of log p_t, (B, 1)."""
    alpha, sigma = schedule.coefficients(t, x)
    v = alpha**2 * WIDTHS**2 + sigma**2
    gap = x - alpha * (c + MEANS)
    r = torch.softmax(WEIGHTS.log() - v.log() / 2 - gap**2 / (2 * v), dim=1)
    return -(r * gap / v).sum(1, keepdim=True)


def guided_parts(alpha: Tensor, sigma: Tensor, x: Tensor, c: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(x_0, eps) with guidance uncond + scale (cond - uncond); the unconditional prompt is 0."""
    with_prompt, without = parts(alpha, sigma, x, c), parts(alpha, sigma, x, torch.zeros_like(c))
    x_0, eps = (u + scale * (w - u) for w, u in zip(with_prompt, without, strict=True))
    return x_0, eps


def ddim_step(schedule: Schedule, x: Tensor, t: Tensor, u: Tensor, c: Tensor, *, scale: float = 1.0) -> Tensor:
    """One step of the (guided) teacher from times `t` to `u`, (B,) each."""
    x_0, eps = guided_parts(*schedule.coefficients(t, x), x, c, scale)
    alpha_u, sigma_u = schedule.coefficients(u, x)
    return alpha_u * x_0 + sigma_u * eps


def ode_map(
    schedule: Schedule, x: Tensor, t: Tensor, u: Tensor, c: Tensor, *, scale: float = 1.0, num_steps: int = 400
) -> Tensor:
    r"""The exact (guided) probability-flow map from times `t` to `u`, (B,) each, by Runge-Kutta in the angle.

    With alpha = \rho cos(phi), sigma = \rho sin(phi), y = x / \rho the ODE is dy/dphi = cos(phi) eps - sin(phi) x_0,
    which is smooth from data (phi = 0) to noise (phi = pi / 2) on every schedule.
    """
    (alpha_t, sigma_t), (alpha_u, sigma_u) = schedule.coefficients(t, x), schedule.coefficients(u, x)
    phi, end = torch.atan2(sigma_t, alpha_t), torch.atan2(sigma_u, alpha_u)
    step = (end - phi) / num_steps

    def slope(y: Tensor, phi: Tensor) -> Tensor:
        x_0, eps = guided_parts(phi.cos(), phi.sin(), y, c, scale)
        return phi.cos() * eps - phi.sin() * x_0

    y = x / torch.hypot(alpha_t, sigma_t)
    for _ in range(num_steps):
        k1 = slope(y, phi)
        k2 = slope(y + step / 2 * k1, phi + step / 2)
        k3 = slope(y + step / 2 * k2, phi + step / 2)
        k4 = slope(y + step * k3, phi + step)
        y, phi = y + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), phi + step
    return y * torch.hypot(alpha_u, sigma_u)


class TableNetwork(nn.Module):
    """The perfect output plus table[prompt, time, (second time,) knot], linear in between.

    Args:
        schedule: The path.
        kind: Parametrisation of the output.
        times: The table's times in the schedule's units, shape (J,).
        prompts: Every c that it will see, 0 (unconditional) among them.
        second_time: Whether the table also depends on r, with the same times.
    """

    def __init__(
        self, schedule: Schedule, kind: str, times: Tensor, prompts: tuple[float, ...], *, second_time: bool = False
    ) -> None:
        super().__init__()
        self.schedule, self.kind, self.second_time = schedule, kind, second_time
        self.register_buffer("times", times.double().unique(sorted=True))
        self.register_buffer("prompts", torch.tensor(prompts, dtype=torch.float64))
        axes = (len(self.times),) * (2 if second_time else 1)
        self.table = nn.Parameter(torch.zeros(len(prompts), *axes, NUM_KNOTS, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, c: Tensor, second_time: Tensor | None = None) -> Tensor:
        assert (second_time is not None) == self.second_time, "the role's second_time must be what it is called with"
        unit = self.schedule.network_time(torch.ones(1, dtype=torch.float64))
        x, t = x.double(), time.double() / unit
        corners = [[((self.prompts - c).abs().argmin(1), 1.0)], self._of_time(t)]
        if second_time is not None:
            corners.append(self._of_time(second_time.double() / unit))
        corners.append(self._of_x(x, t, c))
        return raw_output(self.kind, self.schedule, x, t, c) + self._blend(corners, (), 1.0)[:, None]

    def _blend(self, corners: list, index: tuple, share: Tensor | float) -> Tensor:
        """The sum over all corners of share x table."""
        if not corners:
            return share * self.table[index]
        return sum(self._blend(corners[1:], (*index, i), share * w) for i, w in corners[0])

    def _of_time(self, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The two neighbouring times with their shares; the ends are held beyond the ends."""
        if len(self.times) == 1:
            return [(torch.zeros(len(t), dtype=torch.int64), torch.ones_like(t))]
        below = (torch.searchsorted(self.times, t.detach().contiguous(), right=True) - 1).clamp(0, len(self.times) - 2)
        share = ((t - self.times[below]) / (self.times[below + 1] - self.times[below])).clamp(0, 1)
        return [(below, 1 - share), (below + 1, share)]

    def _of_x(self, x: Tensor, t: Tensor, c: Tensor) -> list[tuple[Tensor, Tensor]]:
        alpha, sigma = self.schedule.coefficients(t, x)
        z = (x - alpha * (c + MEAN)) / (alpha**2 * VARIANCE + sigma**2).sqrt()
        place = ((z / REACH + 1) / 2 * (NUM_KNOTS - 1))[:, 0]
        below = place.detach().floor().long().clamp(0, NUM_KNOTS - 2)
        return [(below, 1 - (place - below)), (below + 1, place - below)]


class MixtureFamily(GaussianFamily):
    """Prompts are numbers: c shifts the mixture. The unconditional c is 0.

    Args:
        schedule: The path.
        kind: Parametrisation of the networks.
        times: Times that the student is called at, in the schedule's units.
        prompts: Every c in use beside 0.
    """

    name = "mixture"
    capabilities = Capabilities(guidance_embedding=True, second_time=True, features=True)

    def __init__(self, schedule: Schedule, kind: str, times: Tensor, *, prompts: tuple[float, ...] = ()) -> None:
        super().__init__(schedule, kind, times)
        self._prompts = (0.0, *prompts)

    def load_network(self):
        return TableNetwork(self._schedule, self._kind, self._times, self._prompts).requires_grad_(False)

    def student_network(self, teacher, *, guidance_embedding=False, second_time=False):
        if second_time:
            return TableNetwork(self._schedule, self._kind, self._times, self._prompts, second_time=True)
        return copy.deepcopy(teacher).requires_grad_(True)

    def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):
        return network(x_t, time, cond["mean"], second_time)

    def features(self, network, x_t, time, cond, *, blocks="first_half"):
        """Eight bumps over x, and one feature that is the network's output."""
        centres = torch.linspace(-2, 2, 8, dtype=torch.float64)
        bumps = torch.exp(-((x_t.double() - centres) ** 2))
        return [torch.cat([bumps, network(x_t, time, cond["mean"])], dim=1)[:, :, None, None]]

    def feature_channels(self, network, *, blocks="first_half"):
        return [9]


def mixture_batch(step: int, size: int, *, mean: float) -> Batch:
    """Data of the mixture for the prompt `mean`."""
    g = torch.Generator().manual_seed(step)
    k = torch.multinomial(WEIGHTS, size, replacement=True, generator=g)
    latents = (mean + MEANS[k] + WIDTHS[k] * torch.randn(size, generator=g, dtype=torch.float64))[:, None]
    cond = {"mean": torch.full((size, 1), mean, dtype=torch.float64)}
    return Batch(latents, cond, tuple(f"s{i}" for i in range(size)), tuple(range(size)), latent_shape=(1,))
