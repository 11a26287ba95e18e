r"""Times of a solver's grid drawn in proportion to the loss seen at them, without a change of the expected loss.

The N steps of the grid lie in K = min(20, N) bins of neighbours, bin b with n_b of them. Of each bin the mean square of
the losses is kept for the last 10 optimizer steps that had samples in it. As soon as every bin has 10,

    r_b = sqrt( mean of the 10 mean squares ),      p_i = (1 - 0.001) r_b / sum_c n_c r_c + 0.001 / N,    i in bin b

and each loss counts with its importance 1 / (N p_i), so that E_p[ L_i / (N p_i) ] = sum_i L_i / N whatever p is. Before
that, p_i = 1 / N. With one sample per step these are the last 10 losses of the paper; means over the samples of a step
depend on neither their order nor how the step is divided over micro-batches and processes.

References:
    Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models (section 3.3), arXiv 2102.09672.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

TimestepSampling = Annotated[
    Literal["uniform", "loss"],
    Field(
        description="How a sample's time is drawn from the grid: uniform; loss: in proportion to the root mean square "
        "of the losses that the last steps saw near it, each loss weighed by 1 / (N p), which leaves what is minimised."
    ),
]
"""The setting `timestep_sampling` of methods that draw a step of a grid for each sample."""
NUM_BINS = 20
HISTORY = 10
"""Optimizer steps that each bin remembers, as in the authors' code."""
UNIFORM_SHARE = 0.001
"""Share of the draws that stays uniform, as in the authors' code: no importance is above 1000."""


class LossHistory:
    """The losses that the last optimizer steps saw in each bin of a grid.

    Its tensors are replaced, never changed in place: a checkpoint that is being written may hold them.

    Args:
        num_steps: N.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.num_bins = num_steps, min(NUM_BINS, num_steps)
        edges = torch.tensor([-(-b * num_steps // self.num_bins) for b in range(self.num_bins + 1)])
        self.first, self.sizes = edges[:-1], edges.diff()
        self.recent = torch.zeros(self.num_bins, HISTORY, dtype=torch.float32)
        """Mean squares of the losses, shape (K, 10); the oldest is replaced."""
        self.num_seen = torch.zeros(self.num_bins, dtype=torch.int64)
        """Number of optimizer steps that had samples in each bin, shape (K,)."""

    def to(self, device: torch.device) -> None:
        """Move the tensors, once; on their device nothing waits."""
        self.first, self.sizes = self.first.to(device), self.sizes.to(device)
        self.recent, self.num_seen = self.recent.to(device), self.num_seen.to(device)

    def probabilities(self) -> Tensor:
        """Return the probability of each bin, shape (K,), float64: n_b p_i."""
        uniform = self.sizes.double() / self.num_steps
        weights = self.sizes * self.recent.double().mean(1).sqrt()
        total = weights.sum()
        known = (self.num_seen >= HISTORY).all() & (total > 0)
        by_loss = (1 - UNIFORM_SHARE) * weights / total + UNIFORM_SHARE * uniform
        return torch.where(known, by_loss, uniform)

    def draw(self, share: Tensor) -> GridDraw:
        """Return steps of the grid, drawn by the inverse of the distribution function.

        Args:
            share: Uniform numbers in [0, 1), shape (B,), float64.
        """
        p = self.probabilities()
        upper = p.cumsum(0)
        share = share * upper[-1]
        bins = torch.searchsorted(upper, share, right=True).clamp(max=self.num_bins - 1)
        chosen, sizes = p[bins], self.sizes[bins]
        inside = (share - (upper[bins] - chosen)) / chosen  # in [0, 1) up to rounding
        index = self.first[bins] + torch.minimum((inside.clamp(min=0) * sizes).long(), sizes - 1)
        return GridDraw(index, (sizes / (self.num_steps * chosen)).float(), bins, self)

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Take the losses of one optimizer step; bins without samples, or with a loss that is not finite, stay.

        Args:
            sums: Sum of the squared losses of each bin, shape (K,), in any unit that `counts` has too.
            counts: Number of samples of each bin, shape (K,).
        """
        seen = (counts > 0) & torch.isfinite(sums)
        slots = torch.arange(HISTORY, device=seen.device) == (self.num_seen % HISTORY).unsqueeze(1)
        means = (sums / counts.clamp(min=torch.finfo(counts.dtype).tiny)).float().unsqueeze(1)
        self.recent = torch.where(slots & seen.unsqueeze(1), means, self.recent)
        self.num_seen = self.num_seen + seen

    def state_dict(self) -> dict[str, Tensor]:
        """Return the losses seen."""
        return {"recent": self.recent, "num_seen": self.num_seen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.recent, self.num_seen = state["recent"], state["num_seen"]


@dataclass(frozen=True)
class GridDraw:
    """Steps of a grid that were drawn for the samples of a micro-batch.

    Attributes:
        index: Numbers of the steps in 0 .. N-1, int64, shape (B,).
        importance: 1 / (N p) of each, shape (B,), float32; None for uniform draws, where it is 1.
        bins: The bin of each, int64, shape (B,); None for uniform draws.
        history: The losses that the draw goes by; None for uniform draws.
    """

    index: Tensor
    importance: Tensor | None = None
    bins: Tensor | None = None
    history: LossHistory | None = None

    def mean(self, losses: Tensor) -> Tensor:
        """Return the estimate of the mean over uniform times from the samples' losses (B,), a scalar."""
        return losses.mean() if self.importance is None else (self.importance.to(losses.dtype) * losses).mean()

    def seen(self, losses: Tensor) -> tuple[SeenLosses, ...]:
        """Return what these draws are to learn from the samples' detached losses (B,); nothing of uniform ones."""
        if self.history is None or self.bins is None:
            return ()
        return (SeenLosses(self.history, self.bins, losses),)


@dataclass(frozen=True)
class SeenLosses:
    """The losses of a micro-batch by the bin that its times were drawn from.

    Attributes:
        history: Takes them once the optimizer step is complete.
        bins: The bin of each sample, int64, shape (B,).
        losses: Detached, without their importance, shape (B,).
    """

    history: LossHistory
    bins: Tensor
    losses: Tensor


def sums_by_bin(parts: Sequence[SeenLosses], *, dtype: torch.dtype) -> Tensor:
    """Return the sums of the squared losses and the counts of each bin, shape (2, K).

    Args:
        parts: The losses of all micro-batches of an optimizer step, of one history.
        dtype: Type of the result, in which processes exchange it; the sums are made in float64.
    """
    squares = torch.cat([part.losses for part in parts]).double().square()
    bins, zeros = torch.cat([part.bins for part in parts]), squares.new_zeros(parts[0].history.num_bins)
    return torch.stack([zeros.scatter_add(0, bins, squares), zeros.scatter_add(0, bins, torch.ones_like(squares))]).to(
        dtype
    )
