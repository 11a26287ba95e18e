r"""Losses that match the distribution of a student's samples to the teacher's, from the outputs of two denoisers.

A sample x of the student is noised, x_t = alpha_t x + sigma_t eps, and denoised by the teacher, D_real(x_t), and by a
network that was trained on the student's samples, D_fake(x_t). Since D(x_t) = (x_t + sigma_t^2 s(x_t)) / alpha_t with
the score s = grad log p_t,

    D_fake - D_real = (sigma_t^2 / alpha_t) (s_fake - s_real)

which is (sigma_t / alpha_t)^2 times the gradient, with respect to x, of KL(student_t || teacher_t): zero where both
agree. Distribution matching (dm) uses it as the gradient of the student's samples, without a derivative of the
denoisers:

    grad = (D_fake - D_real) / mean |x - D_real|,    L = 1/2 mean (x - sg(x - grad))^2

An f-divergence D_f(teacher || student) has the same gradient times h(r) = r^2 f''(r), r = p_teacher / p_student at x_t,

    reverse_kl 1          kl r                        js r / (1 + r)      softened_reverse_kl 1 / (1 + r)
    jeffreys 1 + r        squared_hellinger sqrt(r)   neyman 1 / r

up to a constant factor. With guidance, D_real = D_c + (g - 1)(D_c - D_u), and the gradient has two parts,
which may have times of their own:

    (D_fake - D_c)        distribution matching proper, and        -(g - 1)(D_c - D_u)        guidance augmentation

Score identity distillation (sid) lets the gradient through both denoisers' inputs instead:

    L = mean (D_real - D_fake) ((D_real - x) - a (D_real - D_fake)) / sg(mean |x - D_real|)

As E[x | x_t] = D_fake, its mean is (1 - a) times the squared gap; its gradient differs, since it leaves out that D_fake
depends on the student, which is why a = 1 and above train too.

References:
    Yin et al., One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828.
    Yin et al., Improved Distribution Matching Distillation (dmd2), arXiv 2405.14867.
    Xu et al., One-step Diffusion Models with f-Divergence Distribution Matching, arXiv 2502.15681.
    Liu et al., Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield, arXiv 2511.22677.
    Zhou et al., Score identity Distillation, arXiv 2404.04057.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from . import FlowSchedule, Schedule

Divergence = Literal["reverse_kl", "kl", "js", "softened_reverse_kl", "squared_hellinger", "jeffreys", "neyman"]
NUM_TIME_BINS = 10
SMALLEST_DEVIATION = 1e-5
"""Lower bound of the normaliser mean |x - D_real|, which is 0 where a sample equals its denoised version."""

_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "squared_hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}


def divergence_weight(ratio: Tensor, divergence: Divergence) -> Tensor:
    """Return h(r), up to a constant factor, of density ratios r = p_teacher / p_student > 0 (arXiv 2502.15681).

    Args:
        ratio: r, any shape; the result has the same.
        divergence: The f-divergence that h belongs to.
    """
    return _WEIGHTS[divergence](ratio)


class DivergenceWeights:
    """Weights h(r) / mean h of samples (arXiv 2502.15681).

    The means run over earlier steps, so that no sample's weight depends on its batch. Ratios are first divided by their
    own mean near their time, since the mean of p_teacher / p_student over the student's samples is 1 and that of the
    heads' ratios is not. Both means start at their values for r = 1.

    Args:
        divergence: The f-divergence that h belongs to.
        max_ratio: Density ratios are clamped between 1 / max_ratio and max_ratio.
        decay: Decay of the running means, once per :meth:`update`.
    """

    def __init__(self, divergence: Divergence, *, max_ratio: float, decay: float = 0.95) -> None:
        self._divergence: Divergence = divergence
        self._bound, self._decay = math.log(max_ratio), decay
        one = torch.ones(NUM_TIME_BINS + 1, dtype=torch.float64)
        one[-1] = divergence_weight(one[-1], divergence)
        self._means = one  # of r by time, and of h
        self._seen: Tensor | None = None

    def __call__(self, log_ratio: Tensor, share: Tensor) -> Tensor:
        """Return weights (B,) of samples.

        Args:
            log_ratio: Log density ratios of the heads, shape (B,).
            share: Times as a share of the noisiest time, in [0, 1], shape (B,).
        """
        ratio = log_ratio.detach().double().clamp(-self._bound, self._bound).exp()
        bins = (share * NUM_TIME_BINS).long().clamp(0, NUM_TIME_BINS - 1)
        self._means = self._means.to(ratio.device)
        weight = divergence_weight(ratio / self._means[bins], self._divergence)
        self._note(torch.cat([bins, torch.full_like(bins, NUM_TIME_BINS)]), torch.cat([ratio, weight]))
        return weight / self._means[-1]

    def _note(self, slots: Tensor, values: Tensor) -> None:
        zeros = torch.zeros_like(self._means)
        seen = torch.stack([zeros.scatter_add(0, slots, v) for v in (values, torch.ones_like(values))])
        self._seen = seen if self._seen is None else self._seen + seen

    def update(self, average: Callable[[Sequence[Tensor]], None]) -> None:
        """Update the running means with the values since the last call; every process must call it.

        Args:
            average: Averages tensors over the processes, in place.
        """
        if self._seen is None:
            return
        average([self._seen])
        sums, counts = self._seen
        moved = self._decay * self._means + (1 - self._decay) * sums / counts.clamp(min=1e-9)
        self._means = torch.where(counts > 0, moved, self._means)
        self._seen = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the means; nothing where all weights are 1."""
        return {} if self._divergence == "reverse_kl" else {"means": self._means}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._means, self._seen = state.get("means", self._means).clone(), None


def deviation(x: Tensor, denoised: Tensor) -> Tensor:
    """Return mean |x - D| of each sample, detached, shape (B, 1, ...): the normaliser of the gradients below.

    Args:
        x: Samples of the student, shape (B, ...).
        denoised: D, shape (B, ...).
    """
    axes = tuple(range(1, x.ndim))
    return (x - denoised).detach().abs().mean(axes, keepdim=True).clamp(min=SMALLEST_DEVIATION)


def distribution_matching_gradient(x: Tensor, real: Tensor, fake: Tensor, *, normalise: bool) -> Tensor:
    """Return D_fake - D_real, shape (B, ...) (arXiv 2311.18828).

    Args:
        x: Samples of the student, shape (B, ...).
        real: D_real at the noised samples, shape (B, ...).
        fake: D_fake at the noised samples, shape (B, ...).
        normalise: Whether to divide by mean |x - D_real|.
    """
    gap = fake - real
    return gap / deviation(x, real) if normalise else gap


def augmentation_gradient(x: Tensor, cond: Tensor, uncond: Tensor, *, scale: float, normalise: bool) -> Tensor:
    """Return -(g - 1)(D_c - D_u), the guidance augmentation of arXiv 2511.22677, shape (B, ...).

    Args:
        x: Samples of the student, shape (B, ...).
        cond: D_c, the teacher with the prompt, shape (B, ...).
        uncond: D_u, the teacher without the prompt, shape (B, ...).
        scale: The guidance scale g of uncond + g (cond - uncond).
        normalise: Whether to divide by mean |x - D_c|. The paper gives the sum of scores alone; that each part is
            divided by its own deviation is a choice made here.
    """
    augmentation = (scale - 1) * (uncond - cond)
    return augmentation / deviation(x, cond) if normalise else augmentation


def distribution_matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """Return 1/2 mean (x - sg(x - gradient))^2 of each sample, shape (B,) (arXiv 2311.18828).

    Its derivative by x is `gradient` divided by the number of elements. Both arguments have shape (B, ...).
    """
    return 0.5 * ((x - (x - gradient).detach()) ** 2).flatten(1).mean(1)


def sid_loss(x: Tensor, real: Tensor, fake: Tensor, *, alpha: float, normalise: bool) -> Tensor:
    """Return the loss of score identity distillation (arXiv 2404.04057) of each sample, shape (B,).

    Args:
        x: Samples of the student, shape (B, ...), with their gradient.
        real: D_real at the noised samples, shape (B, ...), with its gradient to them.
        fake: D_fake at the noised samples, likewise.
        alpha: The paper's alpha, a above; the paper uses 1 and 1.2.
        normalise: Whether to divide by mean |x - D_real|.
    """
    gap = real - fake
    product = gap * ((real - x) - alpha * gap)
    return (product / deviation(x, real) if normalise else product).flatten(1).mean(1)


def denoising_target(prediction_type: str, x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return the target (B, ...) of a network that predicts `prediction_type` at x_t = alpha_t x_0 + sigma_t eps.

    Args:
        prediction_type: ``epsilon``, ``sample``, ``v_prediction`` or ``flow``.
        x_0: Clean data, shape (B, ...).
        eps: Noise, shape (B, ...).
        t: Times in the schedule's units, shape (B,).
        schedule: The model's noise schedule.
    """
    if prediction_type == "v_prediction":
        alpha_t, sigma_t = schedule.coefficients(t, x_0)
        return alpha_t * eps - sigma_t * x_0
    return {"epsilon": eps, "sample": x_0, "flow": eps - x_0}[prediction_type]


def time_at(schedule: Schedule, share: Tensor) -> Tensor:
    """Return times (B,) at a `share` (B,) of the way to pure noise: whole timesteps on a table, shifted on a flow."""
    if isinstance(schedule, FlowSchedule):
        return schedule.shifted(share)
    total = schedule.num_train_timesteps
    return (share * total).long().clamp(max=total - 1)
