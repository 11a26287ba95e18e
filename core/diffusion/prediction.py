r"""A network's prediction at (x_t, t), in any parametrisation, and the steps along it.

With x_t = alpha_t x_0 + sigma_t eps, the four parametrisations that networks are trained in,

    epsilon        eps
    sample         x_0
    v_prediction   v = alpha_t eps - sigma_t x_0      (arXiv 2202.00512)
    flow           u = eps - x_0                      (arXiv 2210.02747)

are each a linear combination of x_0 and eps, so that each, with x_t, gives both. Everything is computed in at least
fp32 (dividing by alpha_999 = 0.068 multiplies errors by 14.6); float64 stays float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from torch import Tensor

from .schedule import Schedule, append_dims

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


@dataclass(frozen=True)
class Prediction:
    """A network's output at `x_t`, convertible to the other parametrisations.

    Attributes:
        output: Raw output, shape (B, ...).
        x_t: The noised input, shape (B, ...).
        t: Times in the schedule's units, shape (B,).
        schedule: The noise schedule of x_t.
        prediction_type: The parametrisation of `output`.
    """

    output: Tensor
    x_t: Tensor
    t: Tensor
    schedule: Schedule
    prediction_type: str

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(self.t, self.x_t)
        return self.output.to(alpha.dtype), self.x_t.to(alpha.dtype), alpha, sigma

    @cached_property
    def x0(self) -> Tensor:
        """The denoised data x_0, shape (B, ...)."""
        out, x, alpha, sigma = self._parts
        if self.prediction_type == "epsilon":
            return (x - sigma * out) / alpha
        if self.prediction_type == "v_prediction":
            return (alpha * x - sigma * out) / (alpha**2 + sigma**2)
        if self.prediction_type == "flow":
            return (x - sigma * out) / (alpha + sigma)
        return out

    @cached_property
    def eps(self) -> Tensor:
        """The noise eps, shape (B, ...)."""
        out, x, alpha, sigma = self._parts
        if self.prediction_type == "sample":
            return (x - alpha * out) / sigma
        if self.prediction_type == "v_prediction":
            return (sigma * x + alpha * out) / (alpha**2 + sigma**2)
        if self.prediction_type == "flow":
            return (x + alpha * out) / (alpha + sigma)
        return out

    @property
    def v(self) -> Tensor:
        """v = alpha_t eps - sigma_t x_0, shape (B, ...) (arXiv 2202.00512)."""
        alpha, sigma = self.schedule.coefficients(self.t, self.x_t)
        return alpha * self.eps - sigma * self.x0

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability-flow ODE, shape (B, ...): alpha_t' x_0 + sigma_t' eps (eps - x_0 on a flow)."""
        alpha_dot = append_dims(self.schedule.alpha_dot(self.t), self.x_t)
        sigma_dot = append_dims(self.schedule.sigma_dot(self.t), self.x_t)
        return alpha_dot * self.x0 + sigma_dot * self.eps

    def ddim_step(self, u: Tensor) -> Tensor:
        """Return alpha_u x_0 + sigma_u eps, shape (B, ...): a step along this prediction to times `u` (B,).

        One DDIM step (arXiv 2010.02502) on a variance-preserving table, one Euler step on a flow.
        """
        alpha_u, sigma_u = self.schedule.coefficients(u, self.x_t)
        return alpha_u * self.x0 + sigma_u * self.eps

    def as_type(self, prediction_type: str) -> Tensor:
        """Return the raw output that a network of another prediction type would give, shape (B, ...)."""
        if prediction_type == "flow":
            return self.eps - self.x0
        return {"epsilon": lambda: self.eps, "sample": lambda: self.x0, "v_prediction": lambda: self.v}[
            prediction_type
        ]()


class GuidedPrediction(Prediction):
    """The pair (x_0, eps) of two predictions at one point, extrapolated; made by :func:`classifier_free_guidance`."""

    def __init__(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> None:
        super().__init__(cond.output, cond.x_t, cond.t, cond.schedule, "sample")
        g = append_dims(scale, cond.x_t)
        object.__setattr__(self, "x0", uncond.x0 + g * (cond.x0 - uncond.x0))
        object.__setattr__(self, "eps", uncond.eps + g * (cond.eps - uncond.eps))


def classifier_free_guidance(cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
    """Return uncond + g (cond - uncond), classifier-free guidance (arXiv 2207.12598) of the converted predictions.

    Args:
        cond: Prediction with the prompt.
        uncond: Prediction without it, at the same x_t and t.
        scale: Guidance scale g as pipelines take it, shape (B,); 1 is no guidance.
    """
    return GuidedPrediction(cond, uncond, scale)


def scale_from_paper(w: Tensor | float) -> Tensor | float:
    """Return g = w + 1 of uncond + g (cond - uncond) for w of cond + w (cond - uncond) (arXiv 2310.04378)."""
    return w + 1
