r"""The nearest LoRA to a change of a layer's weight: its singular value decomposition, cut off.

    dW = U S V^T,   B A = U_r S_r V_r^T  is the nearest matrix of rank r (Eckart and Young 1936)

B = U_r S_r and A = V_r^T: rows of A have length 1 also where a singular value is 0, so that such a layer can be trained
on. A convolution (out, in, h, w) is the matrix (out, in h w).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...core.plugin_api.lora_tools import LowRank


@dataclass(frozen=True)
class Factors:
    """A change of low rank of one layer's weight: up @ down.

    Attributes:
        down: (rank, in, ...).
        up: (out, rank), for a convolution (out, rank, 1, 1).
        total: Sum of the squares of the whole change.
        kept: Sum of the squares of up @ down.
    """

    down: Tensor
    up: Tensor
    total: float
    kept: float

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return len(self.down)


def nearest(change: Tensor, low_rank: LowRank) -> Factors:
    """Return the nearest factors to a change of a weight, (out, in, ...), computed in float32."""
    matrix = change.to(low_rank.device, torch.float32).flatten(1)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return _cut(u, s, vt, change.shape[1:], low_rank)


def nearest_product(up: Tensor, down: Tensor, low_rank: LowRank) -> Factors:
    """Return the nearest factors to up @ down, without that product: its decomposition follows from those of both.

    Args:
        up: (out, r) or (out, r, 1, 1).
        down: (r, in, ...).
        low_rank: How much is kept.
    """
    wide_up, wide_down = (one.to(low_rank.device, torch.float32).flatten(1) for one in (up, down))
    q_up, r_up = torch.linalg.qr(wide_up)
    q_down, r_down = torch.linalg.qr(wide_down.T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return _cut(q_up @ u, s, vt @ q_down.T, down.shape[1:], low_rank)


def _cut(u: Tensor, s: Tensor, vt: Tensor, inputs: torch.Size, low_rank: LowRank) -> Factors:
    squares = s.double().square()
    rank = _rank(squares, low_rank)
    up, down = (u * s)[:, :rank], vt[:rank]
    if rank > len(s):  # the same product; rows of A are there to be trained
        up = torch.nn.functional.pad(up, (0, rank - len(s)))
        down = torch.cat([down, _further_rows(down, rank - len(s))])
    ones = [1] * (len(inputs) - 1)
    return Factors(
        down.reshape(rank, *inputs).cpu().contiguous(),
        up.reshape(len(up), rank, *ones).cpu().contiguous(),
        float(squares.sum()),
        float(squares[:rank].sum()),
    )


def _rank(squares: Tensor, low_rank: LowRank) -> int:
    if low_rank.energy is None:
        return low_rank.rank or len(squares)
    total = squares.sum()
    enough = int((squares.cumsum(0) < low_rank.energy * total).sum()) + 1 if total else 1
    return min(enough, len(squares), low_rank.rank or enough)


def _further_rows(down: Tensor, count: int) -> Tensor:
    """Return rows of about length 1 for a LoRA of more rank than its layer's change has, the same every time."""
    generator = torch.Generator().manual_seed(len(down))
    return torch.randn(count, down.shape[1], generator=generator).to(down) / down.shape[1] ** 0.5
