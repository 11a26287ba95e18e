r"""The teacher's trajectory from noise to data: a deterministic solver of its guided probability-flow ODE.

From time t to time s, with the network's x_0 and eps at (x_t, t):

    ddim     x_s = alpha_s x_0 + sigma_s eps                                       (Euler on a flow)
    dpm++    x_s = (sigma_s / sigma_t) x_t + (alpha_s - sigma_s alpha_t / sigma_t) D,
             D = x_0 + (x_0 - x_0') h / (2 h'),   h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t)

where x_0' and h' are those of the step before: of second order, except for the first step and the last. Both visit the
times of ``timestep_spacing="trailing"`` and end at the data (:func:`.diffusion.solvers.trailing_timesteps`).

The solver is the engine's own rather than a pipeline's: it works for every family that predicts, and all points of the
trajectory lie in the schedule's scaling, whatever scheduler the model comes with.

References:
    Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502.
    Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (2M), arXiv 2211.01095.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ...diffusion import Prediction, append_dims
from ...diffusion.guidance import guides
from ...diffusion.solvers import TimestepGrid, step_to
from ...plugin_api.context import Context, Runtime

if TYPE_CHECKING:
    from ...plugin_api.batch import Conditioning
    from ...plugin_api.family import ModelFamily

Solver = Literal["ddim", "dpm++"]
Predict = Callable[[Tensor, Tensor], Prediction]
"""The network's prediction at x (B, ...) and t (B,)."""


@dataclass(frozen=True)
class Trajectory:
    """The trajectory of a solver.

    Attributes:
        points: The points that were asked for, shape (B, P, ...).
        data: Its end, shape (B, ...).
    """

    points: Tensor
    data: Tensor


def follow(
    predict: Predict, x: Tensor, timesteps: TimestepGrid, *, solver: Solver, keep: Sequence[int] = (0,)
) -> Trajectory:
    """Follow the trajectory from `x` (B, ...) at the timestep grid's first point to the data.

    Args:
        predict: The network's prediction at x (B, ...) and t (B,).
        x: Noise, shape (B, ...).
        timesteps: The steps.
        solver: The rule for a step.
        keep: Numbers of the points to keep, rising; 0 is the noise.
    """
    points, before = [], None
    for number, t in enumerate(timesteps.times):
        if number in keep:
            points.append(x)
        prediction = predict(x, t.expand(len(x)))
        if solver == "dpm++":
            x, before = _second_order(prediction, timesteps, number, before), prediction.x0
        else:
            x = step_to(prediction, _at(timesteps, number + 1, len(x)))
    return Trajectory(torch.stack(points, 1), x)


def _at(timesteps: TimestepGrid, number: int, count: int) -> tuple[Tensor, Tensor]:
    return timesteps.at(torch.full((count,), number, device=timesteps.alpha.device))


def _second_order(prediction: Prediction, timesteps: TimestepGrid, number: int, before: Tensor | None) -> Tensor:
    """Make step `number` of DPM-Solver++ 2M; `before` is the x_0 of the step before."""
    x_t, x_0 = prediction.x_t, prediction.x0
    alpha, sigma = timesteps.alpha[number : number + 2], timesteps.sigma[number : number + 2]
    if before is not None and number + 1 < len(timesteps):
        log_snr = timesteps.alpha[number - 1 : number + 2].log() - timesteps.sigma[number - 1 : number + 2].log()
        ratio = (log_snr[2] - log_snr[1]) / (log_snr[1] - log_snr[0])  # 0 after pure noise, which is infinitely far
        x_0 = x_0 + append_dims(ratio.expand(len(x_t)) / 2, x_t) * (x_0 - before)
    kept = sigma[1] / sigma[0]
    gained = alpha[1] - kept * alpha[0]
    return append_dims(kept.expand(len(x_t)), x_t) * x_t + append_dims(gained.expand(len(x_t)), x_t) * x_0


class TeacherAlone:
    """The bare teacher, loaded on first use, for work that precedes a run's networks.

    Args:
        family: The teacher's family.
    """

    def __init__(self, family: ModelFamily) -> None:
        self._family = family
        self._network: nn.Module | None = None

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """Yield the teacher, whatever the role is called."""
        if self._network is None:
            self._network = self._family.load_network()
        yield self._network

    def release(self) -> None:
        """Free the teacher; it is loaded again when it is needed."""
        self._network = None

    def guided(self, cond: Conditioning, scale: float) -> Predict:
        """Return the teacher's predictions with `cond` (B in front) at guidance scale `scale`; with guidance, both
        predictions are one call.
        """
        device = torch.device(self._family.settings.device)
        context = Context(Runtime(self._family, self, seed=0, device=device))

        def predict(x: Tensor, t: Tensor) -> Prediction:
            if not guides(scale):
                return context.predict("teacher", x, t, cond)
            return context.predict_guided(x, t, cond, torch.full((len(x),), scale, dtype=torch.float64, device=device))

        return predict
