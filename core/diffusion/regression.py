"""How far an output is from its target, sample by sample, and how samples are weighted.

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
HuberC = Annotated[float, Field(gt=0, description="c of the huber loss, in latent units.")]
"""Their setting `huber_c`."""


def distance(output: Tensor, target: Tensor, *, loss_type: str, huber_c: float) -> Tensor:
    """Mean over the elements of each sample, shape (B,), of d^2 (l2) or sqrt(d^2 + c^2) - c (huber, elementwise)."""
    squared = (output - target) ** 2
    if loss_type == "huber":
        squared = (squared + huber_c**2).sqrt() - huber_c
    return squared.flatten(1).mean(1)


def truncated_snr(log_snr: Tensor) -> Tensor:
    """max(SNR, 1), the weight of an x_0 error that is the larger of the x_0 and the eps error; shape of `log_snr`."""
    return log_snr.exp().clamp(min=1)


SnrWeight = Annotated[
    Literal["truncated_snr", "snr_plus_one"],
    Field(description="Weight of the x0 error: truncated_snr: max(SNR, 1); snr_plus_one: SNR + 1, the error of v."),
]
"""The setting `loss_weight` of methods that call :func:`snr_weight`."""


def snr_weight(log_snr: Tensor, kind: SnrWeight) -> Tensor:
    """Weight of an x_0 error: :func:`truncated_snr`, or SNR + 1, which makes it the v error; shape of `log_snr`."""
    return truncated_snr(log_snr) if kind == "truncated_snr" else log_snr.exp() + 1
