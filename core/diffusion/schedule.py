r"""Noise schedules: how an image turns into noise.

Every schedule is a Gaussian path

    x_t = alpha_t x_0 + sigma_t eps,    eps ~ N(0, I)

where t is the schedule's own time and grows with the noise. :class:`DDPMSchedule` counts timesteps 0 .. T-1 of a
discrete table (also between them); :class:`FlowSchedule` runs from 0 (data) to 1 (noise).

All coefficients are computed in float64 and returned with the shape of `t`; :func:`append_dims` makes them broadcast.

References:
    Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (zero terminal SNR), arXiv 2305.08891.
    Lipman et al., Flow Matching for Generative Modeling, arXiv 2210.02747.
    Esser et al., Scaling Rectified Flow Transformers (shift), arXiv 2403.03206.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


def append_dims(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` (B,) with trailing axes appended to match the axes of `like`, in its type, at least fp32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return value.to(dtype).reshape(value.shape + (1,) * (like.ndim - value.ndim))


@dataclass(frozen=True)
class SolverGrid:
    """N steps of a solver over a schedule, from clean (first) to noisy (last).

    Attributes:
        times: Start of each step in the schedule's units, shape (N,), growing.
        previous: End of each step, shape (N,); indexed by the number of the step, never by a time.
    """

    times: Tensor
    previous: Tensor

    def __len__(self) -> int:
        return len(self.times)

    def to(self, device: str | torch.device) -> SolverGrid:
        """Return the same grid on `device`."""
        return SolverGrid(self.times.to(device), self.previous.to(device))


class Schedule(ABC):
    """A Gaussian path from data to noise; see the module's equation. Times `t` are in its own units."""

    clean_at_zero: bool
    """Whether x_t at t = 0 is the data itself (sigma_0 = 0): a consistency function meets its boundary there."""
    t_max: float
    """The noisiest time."""
    num_train_timesteps: int
    """T in the model's scheduler config."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha_t, shape of `t`, float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma_t, shape of `t`, float64."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return d alpha_t / dt, shape of `t`, float64."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return d sigma_t / dt, shape of `t`, float64."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at which :meth:`log_snr` has this value, shape of `log_snr`."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Return the network's time input for time `t`, shape of `t`."""

    @abstractmethod
    def grid(self, num_steps: int) -> SolverGrid:
        """Return the solver's grid with `num_steps` steps."""

    @property
    @abstractmethod
    def zero_terminal_snr(self) -> bool:
        """True if alpha_t is exactly 0 at the noisiest time (arXiv 2305.08891)."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha_t^2 / sigma_t^2), shape of `t`, float64."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t) for `t` (B,), shaped to broadcast against `like` (B, ...)."""
        return append_dims(self.alpha(t), like), append_dims(self.sigma(t), like)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha_t x_0 + sigma_t eps for `x_0`, `eps` of shape (B, ...) and `t` of shape (B,)."""
        alpha_t, sigma_t = self.coefficients(t, x_0)
        return alpha_t * x_0 + sigma_t * eps


class DDPMSchedule(Schedule):
    r"""A variance-preserving table, alpha_t^2 + sigma_t^2 = 1, as an angle: alpha_t = cos(theta_t), sigma_t =
    sin(theta_t).

    At integer t this is the table itself, alpha_t = sqrt(alphas_cumprod[t]); between integers theta is linear, which
    keeps every quantity finite and monotone also with zero terminal SNR (theta = pi/2).

    Args:
        alphas_cumprod: Shape (T,), falling.
    """

    clean_at_zero = False

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.to("cpu", torch.float64)
        theta = torch.atan2((1 - table).sqrt(), table.sqrt())
        self._theta = {torch.device("cpu"): theta}
        self._last_alpha_is_zero = bool(table[-1] == 0)
        self.num_train_timesteps = len(table)
        self.t_max = float(len(table) - 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DDPMSchedule:
        """Build the table that a diffusers scheduler config describes (betas, zero terminal SNR)."""
        trained = config.get("trained_betas")
        betas = _betas(config) if trained is None else torch.tensor(trained, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if config.get("rescale_betas_zero_snr", False):
            alphas_cumprod = rescale_to_zero_snr(alphas_cumprod)
        return cls(alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        return self._last_alpha_is_zero

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._theta:
            self._theta[device] = self._theta[torch.device("cpu")].to(device)
        return self._theta[device]

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return theta_t and d theta_t / dt, each with the shape of `t`."""
        theta = self._table(t.device)
        t = t.to(torch.float64)
        below = t.floor().clamp(0, len(theta) - 2).long()
        slope = theta[below + 1] - theta[below]
        # the table's own value at its end, and yet a function of t: it may be differentiated
        at_end = theta[below + 1] + (t - (below + 1)) * slope
        return torch.where(t == below + 1, at_end, theta[below] + (t - below) * slope), slope

    def alpha(self, t: Tensor) -> Tensor:
        theta, slope = self._angle(t)
        alpha = theta.cos()
        if self._last_alpha_is_zero:  # cos(pi/2) is 6e-17 in floating point
            alpha = torch.where(t == self.t_max, (self.t_max - t) * slope, alpha)
        return alpha

    def sigma(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].sin()

    def alpha_dot(self, t: Tensor) -> Tensor:
        theta, slope = self._angle(t)
        return -theta.sin() * slope

    def sigma_dot(self, t: Tensor) -> Tensor:
        theta, slope = self._angle(t)
        return theta.cos() * slope

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        table = self._table(log_snr.device)
        theta = torch.atan((-log_snr.to(torch.float64) / 2).exp())
        below = (torch.searchsorted(table, theta.contiguous()) - 1).clamp(0, len(table) - 2)
        return below + (theta - table[below]) / (table[below + 1] - table[below])

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def grid(self, num_steps: int) -> SolverGrid:
        """Return LCM's grid (arXiv 2310.04378).

        t_i = (i + 1) k - 1 with k = T // N, each step ending at max(t_i - k, 0).
        """
        if not 1 <= num_steps <= self.num_train_timesteps:
            raise UserError(
                f"a grid of {num_steps} steps does not fit a schedule of {self.num_train_timesteps} timesteps",
                f"choose 1 to {self.num_train_timesteps} steps",
            )
        k = self.num_train_timesteps // num_steps
        times = torch.arange(1, num_steps + 1, dtype=torch.int64) * k - 1
        return SolverGrid(times, (times - k).clamp(min=0))


class FlowSchedule(Schedule):
    r"""Flow matching: alpha_t = 1 - t, sigma_t = t for t in [0, 1]; the network's time input is T t.

    Args:
        shift: Resolution shift m of the *grid*: shift(s) = m s / (1 + (m - 1) s) (arXiv 2403.03206). Times given to the
            other methods are shifted already; it is applied once, where a grid is made.
        num_train_timesteps: T, the factor of the network's time.
    """

    clean_at_zero = True
    t_max = 1.0

    def __init__(self, shift: float = 1.0, num_train_timesteps: int = 1000) -> None:
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """Build the schedule that a diffusers scheduler config of flow matching describes."""
        shift = config.get("flow_shift" if is_solver_of_flow(config) else "shift", 1.0)
        return cls(float(shift), int(config.get("num_train_timesteps", 1000)))

    @property
    def zero_terminal_snr(self) -> bool:
        return True

    def shifted(self, s: Tensor) -> Tensor:
        """Return m s / (1 + (m - 1) s) for s in [0, 1], shape of `s`."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.to(torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.to(torch.float64)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t, dtype=torch.float64)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.to(torch.float64) / 2)

    def network_time(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps

    def grid(self, num_steps: int) -> SolverGrid:
        """Return the grid sigma_j = shift(j / N), j = 1 .. N; the last step ends at sigma_0 = 0."""
        edges = self.shifted(torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)
        return SolverGrid(edges[1:], edges[:-1])


def _betas(config: Mapping[str, Any]) -> Tensor:
    num = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, num, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        edges = (torch.arange(num + 1, dtype=torch.float64) / num + 0.008) / 1.008 * torch.pi / 2
        alpha_bar = edges.cos() ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise UserError(
        f"scheduler config: beta_schedule = {kind!r} is not known",
        "accepted: linear, scaled_linear, squaredcos_cap_v2, or trained_betas",
    )


def rescale_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that its last value is 0 and its first unchanged (arXiv 2305.08891)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


def is_flow(config: Mapping[str, Any]) -> bool:
    """Return True for a scheduler config of diffusers' flow matching, or of a solver of other noise set to it."""
    return "FlowMatch" in str(config.get("_class_name", "")) or is_solver_of_flow(config)


def is_solver_of_flow(config: Mapping[str, Any]) -> bool:
    """Return True for a scheduler config of a solver, as DPM-Solver, that is set to flow matching."""
    return bool(config.get("use_flow_sigmas")) and config.get("prediction_type") == "flow_prediction"


def from_scheduler_config(config: Mapping[str, Any]) -> tuple[Schedule, str]:
    """Return schedule and prediction type of a diffusers scheduler config.

    The prediction type is ``epsilon``, ``v_prediction``, ``sample`` or ``flow``.
    """
    if is_flow(config):
        return FlowSchedule.from_config(config), "flow"
    return DDPMSchedule.from_config(config), str(config.get("prediction_type", "epsilon"))
