"""Distances between output and target of each sample, and their weights.

References:
    Song and Dhariwal, Improved Techniques for Training Consistency Models (pseudo-Huber), arXiv 2310.14189.
    Salimans and Ho, Progressive Distillation (truncated SNR weight), arXiv 2202.00512.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .schedule import Schedule

LossType = Annotated[
    Literal["l2", "huber"],
    Field(description="l2: squared difference; huber: sqrt(d^2 + huber_c^2) - huber_c, robust to outliers."),
]
"""The setting `loss_type` of methods that call :func:`distance`."""
HuberC = Annotated[float, Field(gt=0, le=1e6, description="c of the huber loss, in latent units.")]
"""Their setting `huber_c`."""


def distance(output: Tensor, target: Tensor, *, loss_type: str, huber_c: float) -> Tensor:
    """Return the mean over each sample's elements of d^2 (l2) or sqrt(d^2 + c^2) - c (huber), shape (B,).

    Args:
        output: Shape (B, ...).
        target: Shape (B, ...); d = output - target.
        loss_type: ``l2`` or ``huber`` (pseudo-Huber, arXiv 2310.14189).
        huber_c: c, in the units of d.
    """
    squared = (output - target) ** 2
    if loss_type == "huber":
        squared = (squared + huber_c**2).sqrt() - huber_c
    return squared.flatten(1).mean(1)


def truncated_snr(log_snr: Tensor) -> Tensor:
    """Return max(SNR, 1), the weight that makes an x_0 error the larger of x_0 and eps error (arXiv 2202.00512).

    Args:
        log_snr: log(alpha_t^2 / sigma_t^2); the result has its shape.
    """
    return log_snr.exp().clamp(min=1)


WEIGHTS = {
    "truncated_snr": "max(SNR, 1)",
    "snr_plus_one": "SNR + 1, on a table of betas the error of v",
    "v_error": "the error of v on a table of betas, 1 / sigma^2, and of the velocity on a flow, 1 / t^2",
    "trained_space": "the error of what the network predicts (eps: SNR; x0: 1; v, velocity: as v_error)",
}
"""Value of the setting `loss_weight` -> the weight of the squared x_0 error, in words."""
ErrorWeight = Annotated[
    Literal["truncated_snr", "snr_plus_one", "v_error", "trained_space"],
    Field(description=f"Weight of the x0 error: {'; '.join(f'{kind}: {words}' for kind, words in WEIGHTS.items())}."),
]
"""The setting `loss_weight` of methods that call :func:`error_weight`."""


def error_weight(schedule: Schedule, t: Tensor, *, kind: str, prediction_type: str) -> Tensor:
    """Return the weight of a squared x_0 error at times `t` (B,), shape (B,), float64 (arXiv 2202.00512).

    Args:
        schedule: The noise schedule.
        t: Times in the schedule's units, shape (B,).
        kind: One of :data:`WEIGHTS`.
        prediction_type: What the network predicts, for ``trained_space``.
    """
    if kind == "truncated_snr":
        return truncated_snr(schedule.log_snr(t))
    if kind == "snr_plus_one":
        return schedule.log_snr(t).exp() + 1
    own = "flow" if schedule.clean_at_zero else "v_prediction"
    return error_of_x0(schedule, t, prediction_type if kind == "trained_space" else own) ** 2


def error_of_x0(schedule: Schedule, t: Tensor, prediction_type: str) -> Tensor:
    """Return how far a prediction is off per unit of error of its x_0, shape of `t`, float64.

    x_t is known, so that an error of x_0 is one of eps too, -alpha / sigma times as large. It is (alpha^2 + sigma^2) /
    sigma of v and (alpha + sigma) / sigma of eps - x_0; on a variance-preserving table the first is 1 / sigma, and its
    square SNR + 1, on a flow the second is 1 / t.

    Args:
        schedule: The noise schedule.
        t: Times in the schedule's units.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if prediction_type == "epsilon":
        return alpha / sigma
    if prediction_type == "v_prediction":
        return (alpha**2 + sigma**2) / sigma
    if prediction_type == "flow":
        return (alpha + sigma) / sigma
    return torch.ones_like(sigma)
