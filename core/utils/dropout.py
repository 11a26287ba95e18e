"""Dropout whose masks are named draws, as all others of a run: functions of seed, step, position, role and layer.

PyTorch's own draws from the generator of the whole process, so that its masks depend on everything that was drawn
before: whether the caches were warm, how often a step accumulates, how many processes there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .seeds import derive_seed


@dataclass(frozen=True)
class NetworkCall:
    """One call of a role's network in a step."""

    seed: int
    step: int
    positions: tuple[int, ...]
    """Position of each sample in the global batch."""
    role: str
    number: int
    """How many calls of the role came before it in the same step."""


_current: NetworkCall | None = None
# a plain global: under gradient checkpointing autograd runs the recomputation in a thread of its own


def current_call() -> NetworkCall | None:
    """Return the call that is running; None outside of a training step."""
    return _current


@contextmanager
def within(call: NetworkCall | None) -> Iterator[None]:
    """Draw the masks of `call` inside the block."""
    global _current
    before, _current = _current, call
    try:
        yield
    finally:
        _current = before


class NamedDropout(nn.Module):
    """Dropout of one layer; outside of a training step it is PyTorch's.

    Args:
        p: Share of the elements that become zero.
        name: Name of the layer.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p, self.name = p, name

    def extra_repr(self) -> str:
        """Return what a printed network says of the layer."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, shape (B, ...), with elements dropped and the others scaled by 1 / (1 - p)."""
        if not self.training:
            return x
        if _current is None:
            return nn.functional.dropout(x, self.p)
        return x * (self._kept(_current, x) / (1 - self.p)).to(x.dtype)

    def _kept(self, call: NetworkCall, x: Tensor) -> Tensor:
        """Return ones and zeros, shape as `x`, float32; each row from a generator of its own."""
        rows = _rows(call.positions, len(x))
        if rows is None:  # not a row for each sample, as of what all samples share
            return self._draw(call, x.shape, x.device, "shared")
        return torch.stack([self._draw(call, x.shape[1:], x.device, *row) for row in rows])

    def _draw(self, call: NetworkCall, shape: Sequence[int], device: torch.device, *row: str | int) -> Tensor:
        seed = derive_seed(call.seed, f"dropout/{call.role}/{self.name}", call.step, call.number, *row)
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.rand(tuple(shape), generator=generator, device=device) >= self.p).float()


def _rows(positions: Sequence[int], num_rows: int) -> list[tuple[int, int]] | None:
    """Return (position, copy) of each row, where a call holds the batch once or several times after each other."""
    if not positions or num_rows % len(positions):
        return None
    return [(position, copy) for copy in range(num_rows // len(positions)) for position in positions]
