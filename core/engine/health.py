"""Detects losses that are not finite, without synchronising the device: each step's flag is read one step later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DistillError


@dataclass(frozen=True)
class _Pending:
    role: str
    step: int
    taken: Tensor
    bad_samples: Tensor
    keys: tuple[str, ...]
    ready: torch.cuda.Event | None


class HealthMonitor:
    """Counts withheld updates and ends the run, naming the samples, after too many in a row.

    Args:
        max_bad_steps: Consecutive withheld updates after which the run stops.
        gather: Gathers a value from every process: all withhold the same updates, for samples of their own.
    """

    def __init__(self, max_bad_steps: int, *, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> None:
        self._max, self._gather = max_bad_steps, gather
        self._pending: list[_Pending] = []
        self._names: Counter[str] = Counter()
        self.consecutive: dict[str, int] = {}
        self.total = 0

    def record(self, role: str, step: int, taken: Tensor, bad_samples: Tensor, keys: Sequence[str]) -> None:
        """Note a step's flags; :meth:`check` reads them, before the next step begins.

        Args:
            role: The role that was updated.
            step: Optimizer step.
            taken: Boolean scalar, whether the update was taken.
            bad_samples: Boolean, shape (B,), samples whose own loss is not finite.
            keys: B sample keys.
        """
        ready = None
        if taken.device.type == "cuda":
            taken, bad_samples = taken.to("cpu", non_blocking=True), bad_samples.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Pending(role, step, taken, bad_samples, tuple(keys), ready))

    def check(self) -> None:
        """Read the flags that were noted last. Raises DistillError after too many bad steps in a row."""
        noted, self._pending = self._pending, []
        for pending in noted:
            self._read(pending)

    def _read(self, pending: _Pending) -> None:
        if pending.ready is not None:
            pending.ready.synchronize()
        if bool(pending.taken):
            self.consecutive[pending.role] = 0
            return
        self.consecutive[pending.role] = self.consecutive.get(pending.role, 0) + 1
        self.total += 1
        named = [key for key, bad in zip(pending.keys, pending.bad_samples.tolist(), strict=True) if bad]
        self._names.update(named or pending.keys)
        if self.consecutive[pending.role] >= self._max:
            raise DistillError(self._message(pending.role, pending.step))

    def _message(self, role: str, step: int) -> str:
        every = sum(self._gather(self._names), Counter[str]())
        names = ", ".join(key for key, _ in every.most_common(10))
        return (
            f"the {role}'s loss or gradient was not finite {self.consecutive[role]} times in a row (the last is step "
            f"{step}); no such update was taken. Samples involved: {names}\n"
            "  lower learning_rate, use mixed_precision=bf16 or no instead of fp16, or look at these samples"
        )
