r"""Consistency functions, constant along a trajectory, made from a network's prediction.

    f(x_t, t)     = c_skip(t) x_t + c_out(t) x_0^(x_t, t)          to the clean end, f(x, 0) = x
    J_{t -> s}    = alpha_s x_0^(x_t, t) + sigma_s eps^(x_t, t)    to time s, J_{t -> t} = x

References:
    Song et al., Consistency Models, arXiv 2303.01469.
    Luo et al., Latent Consistency Models, arXiv 2310.04378.
    Zheng et al., Trajectory Consistency Distillation, arXiv 2402.19159.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from . import Prediction, append_dims

EmaTarget = Annotated[
    bool | None,
    Field(
        description="Whether the target network is the student's exponential moving average (0.95), which is then what "
        "is exported; null: in full training alone, a LoRA being its own target."
    ),
]
"""The setting `ema_target` of consistency methods."""
SIGMA_DATA = 0.5


def boundary_scalings(t: Tensor, *, timestep_scaling_factor: float) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out of the consistency function (arXiv 2310.04378), float64; (1, 0) exactly at t = 0.

    Args:
        t: Integer timesteps, shape (B,).
        timestep_scaling_factor: s in c_skip = 0.25 / ((s t)^2 + 0.25), c_out = s t / sqrt((s t)^2 + 0.25).
    """
    scaled = timestep_scaling_factor * t.to(torch.float64)
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


def consistency_function(prediction: Prediction, *, timestep_scaling_factor: float) -> Tensor:
    """Return f(x_t, t) of shape (B, ...) (arXiv 2303.01469, 2310.04378).

    It is c_skip x_t + c_out x_0 on a table of betas, and x_0 itself (x_t at t = 0) where t = 0 is clean.
    """
    if prediction.schedule.clean_at_zero:
        return torch.where(append_dims(prediction.t, prediction.x_t) == 0, prediction.x_t, prediction.x0)
    scalings = boundary_scalings(prediction.t, timestep_scaling_factor=timestep_scaling_factor)
    c_skip, c_out = (append_dims(scaling, prediction.x_t) for scaling in scalings)
    return c_skip * prediction.x_t + c_out * prediction.x0


def trajectory_function(prediction: Prediction, s: Tensor) -> Tensor:
    """Return J_{t -> s} of shape (B, ...) for times `s` (B,), exactly x_t where s = t (arXiv 2402.19159).

    alpha_s x_0 + sigma_s eps is x_t at s = t only up to rounding; the boundary is set, not approximated.
    """
    at_boundary = append_dims((prediction.t == s).double(), prediction.x_t).bool()
    return torch.where(at_boundary, prediction.x_t, prediction.ddim_step(s))


def has_ema_target(ema_target: bool | None, model_type: str) -> bool:
    """Return True if the target network is an average of the student, by the setting and the kind of student."""
    return model_type == "full" if ema_target is None else ema_target
