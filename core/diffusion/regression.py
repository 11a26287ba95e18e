"""Distances between output and target of each sample, and their weights.

References:
    Song and Dhariwal, Improved Techniques for Training Consistency Models (pseudo-Huber), arXiv 2310.14189.
    Salimans and Ho, Progressive Distillation (truncated SNR weight), arXiv 2202.00512.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

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


SnrWeight = Annotated[
    Literal["truncated_snr", "snr_plus_one"],
    Field(description="Weight of the x0 error: truncated_snr: max(SNR, 1); snr_plus_one: SNR + 1, the error of v."),
]
"""The setting `loss_weight` of methods that call :func:`snr_weight`."""


def snr_weight(log_snr: Tensor, kind: SnrWeight) -> Tensor:
    """Return the weight of a squared x_0 error, shape of `log_snr` (arXiv 2202.00512).

    Args:
        log_snr: log(alpha_t^2 / sigma_t^2).
        kind: ``truncated_snr``: max(SNR, 1); ``snr_plus_one``: SNR + 1, which makes it the v error.
    """
    return truncated_snr(log_snr) if kind == "truncated_snr" else log_snr.exp() + 1
