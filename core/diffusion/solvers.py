r"""The deterministic sampler as a grid of timesteps from noise to data: its times, its steps, and their inverse.

One step along a prediction from time t to time s,

    x_s = alpha_s x_0 + sigma_s eps,    eps = (x_t - alpha_t x_0) / sigma_t

is one of DDIM on a table of betas and one of Euler on a flow. Solved for x_0 it gives the prediction that a network
must make at x_t to land on a given x_s, whatever number of steps led there:

    x_0* = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)

On a flow (alpha = 1 - t, sigma = t) that is the average velocity: x_0* = x_t - t (x_t - x_s) / (t - s).

References:
    Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502.
    Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (trailing spacing), arXiv 2305.08891.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from . import Prediction, Schedule, append_dims
from .sampler import Sampler

Coefficients = tuple[Tensor, Tensor]
"""alpha and sigma of one time per sample, shape (B,) each."""


@dataclass(frozen=True)
class TimestepGrid:
    """N steps from the noisiest time to the data; step j goes from point j to point j + 1, and point N is the data.

    Attributes:
        times: Times in the schedule's units at which the network is called, falling, shape (N,).
        alpha: alpha of the points, shape (N + 1,), float64; the last is 1.
        sigma: sigma of the points, shape (N + 1,), float64; the last is 0, also on a table whose own end is noisy.
    """

    times: Tensor
    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.times)

    def to(self, device: str | torch.device) -> TimestepGrid:
        """Return the same timestep grid on `device`."""
        return TimestepGrid(self.times.to(device), self.alpha.to(device), self.sigma.to(device))

    def at(self, point: Tensor) -> Coefficients:
        """Return (alpha, sigma) of points with these numbers, each of shape (B,)."""
        return self.alpha[point], self.sigma[point]

    def time_at(self, point: Tensor) -> Tensor:
        """Return the times of points with these numbers, shape (B,); the lowest of the schedule, 0, for the data."""
        return torch.cat([self.times, self.times.new_zeros(1)])[point]


def trailing_timesteps(schedule: Schedule, num_steps: int) -> TimestepGrid:
    """Return the grid T - 1, T - 1 - T/N, ... of ``timestep_spacing="trailing"`` (arXiv 2305.08891).

    On a flow it is shift(1), shift(1 - 1/N), ... The points of N steps are every k-th one of k N steps.

    Raises:
        UserError: There are more steps than timesteps.
    """
    if schedule.clean_at_zero:
        times = schedule.grid(num_steps).times.flip(0)
    else:
        total = schedule.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise UserError(f"{num_steps} steps do not fit a model of {total} timesteps", f"choose 1 to {total} steps")
        # multiplied before it is divided, which gives fractions of one value one rounding: the points nest
        times = (torch.arange(num_steps, 0, -1, dtype=torch.float64) * total / num_steps).round().long() - 1
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    return TimestepGrid(times, torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)]))


def step_to(prediction: Prediction, end: Coefficients) -> Tensor:
    """Return x_s = alpha_s x_0 + sigma_s eps of shape (B, ...) for `end` = (alpha_s, sigma_s) (arXiv 2010.02502)."""
    alpha_s, sigma_s = (append_dims(part, prediction.x_t) for part in end)
    return alpha_s * prediction.x0 + sigma_s * prediction.eps


def data_of_step(x_t: Tensor, x_s: Tensor, *, start: Coefficients, end: Coefficients) -> Tensor:
    """Return x_0*, the x_0 prediction at `x_t` with which one step lands on `x_s`, shape (B, ...) (arXiv 2202.00512).

    Finite also where alpha_t = 0 (pure noise) and where sigma_s = 0 (there it is x_s / alpha_s).

    Args:
        x_t: Start of the step, shape (B, ...).
        x_s: End of the step, shape (B, ...).
        start: (alpha_t, sigma_t), sigma_t above 0.
        end: (alpha_s, sigma_s), less noisy.
    """
    (_, sigma_t), (_, sigma_s) = start, end
    gap = append_dims(reach_of_step(start=start, end=end), x_t)
    return (x_s - append_dims(sigma_s / sigma_t, x_t) * x_t) / gap


def reach_of_step(*, start: Coefficients, end: Coefficients) -> Tensor:
    """Return alpha_s - (sigma_s / sigma_t) alpha_t, shape (B,): how far x_s is off per unit of error of x_0.

    It is 1 where the step ends at the data.

    Args:
        start: (alpha_t, sigma_t), sigma_t above 0.
        end: (alpha_s, sigma_s), less noisy.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = start, end
    return alpha_s - sigma_s / sigma_t * alpha_t


def deterministic_sampler(
    schedule: Schedule, num_steps: int, guidance_scale: float, *, spacing: str | None = "trailing"
) -> Sampler:
    """Return DDIM (Euler on a flow) ending at the data, over :func:`trailing_timesteps` unless `spacing` differs.

    diffusers' DDIM steps by T // N timesteps and the timestep grid by T / N, which is the same where N divides T.

    Args:
        schedule: The model's noise schedule.
        num_steps: N.
        guidance_scale: The pipeline's guidance scale; 0 is off.
        spacing: ``timestep_spacing`` on a table of betas; None uses the model's own.
    """
    timesteps = trailing_timesteps(schedule, num_steps)
    if schedule.clean_at_zero:
        # the times are shifted already: the scheduler must not do it again
        config = {"shift": 1.0, "use_dynamic_shifting": False}
        call = {"sigmas": timesteps.sigma[:-1].tolist()}
        return Sampler("FlowMatchEulerDiscreteScheduler", config, num_steps, guidance_scale, call)
    config = {"set_alpha_to_one": True, "clip_sample": False}
    config |= {} if spacing is None else {"timestep_spacing": spacing}
    return Sampler("DDIMScheduler", config, num_steps, guidance_scale)
