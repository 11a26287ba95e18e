"""Exponential moving averages of weights, ``average <- decay * average + (1 - decay) * weight``, per optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_LOW = (torch.float16, torch.bfloat16)


class EMA:
    """The average of a list of tensors, updated in place and in one fused pass.

    Args:
        averages: The tensors that hold the average, in float32 or wider (a bf16 one would not change at high decays).
        decay: In [0, 1); 0 copies.
        warmup: Start with smaller decays, ``min(decay, (1 + n) / (10 + n))`` at update n, to forget the start.
    """

    def __init__(self, averages: Sequence[Tensor], *, decay: float, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must be at least 0 and below 1, not {decay}")
        low = [tensor.dtype for tensor in averages if tensor.dtype in _LOW]
        if low:
            raise ValueError(f"an average kept in {low[0]} loses its updates to rounding; keep it in float32")
        self.averages = list(averages)
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0

    @classmethod
    def copy_of(cls, tensors: Sequence[Tensor], *, decay: float, warmup: bool = False) -> EMA:
        """Return an average that starts at a copy of `tensors` in at least float32."""
        return cls([_wide(tensor.detach()).clone() for tensor in tensors], decay=decay, warmup=warmup)

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor]) -> None:
        """Update the average with `tensors`, which have the shapes of the averages in the same order."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay
        if len(tensors) != len(self.averages):
            raise ValueError(f"{len(tensors)} tensors for {len(self.averages)} averages")
        sources = [source.detach().to(average.dtype) for source, average in zip(tensors, self.averages, strict=True)]
        if sources:
            torch._foreach_lerp_(self.averages, sources, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, tensors: Sequence[Tensor]) -> None:
        """Write the average into `tensors`."""
        for tensor, average in zip(tensors, self.averages, strict=True):
            tensor.copy_(average)

    @contextmanager
    def applied_to(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Write the average into `tensors` inside the block; restore their own values, bit for bit, after it."""
        kept = [tensor.detach().clone() for tensor in tensors]
        self.copy_to(tensors)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, kept, strict=True):
                    tensor.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Return flat tensors for a checkpoint."""
        state = {f"average.{index}": tensor for index, tensor in enumerate(self.averages)}
        return {**state, "num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, into the tensors that hold the average."""
        if len(state) != len(self.averages) + 1:
            raise ValueError(f"the state has {len(state) - 1} averages, this one {len(self.averages)}")
        for index, average in enumerate(self.averages):
            average.copy_(state[f"average.{index}"])
        self.num_updates = int(state["num_updates"])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _LOW else tensor
