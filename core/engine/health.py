"""Watches for losses that are not finite, without stopping the device: each step's flag is read one step later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DistillError


@dataclass(frozen=True)
class _Pending:
    step: int
    taken: Tensor
    bad_samples: Tensor
    keys: tuple[str, ...]
    ready: torch.cuda.Event | None


class HealthMonitor:
    """Counts withheld updates and ends the run, with the samples' names, after too many in a row.

    Args:
        max_bad_steps: Consecutive withheld updates after which the run stops.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self._max = max_bad_steps
        self._pending: _Pending | None = None
        self._names: Counter[str] = Counter()
        self.consecutive = 0
        self.total = 0

    def record(self, step: int, taken: Tensor, bad_samples: Tensor, keys: Sequence[str]) -> None:
        """Note a step's flags; what is read here is the step before.

        Args:
            step: Optimizer step.
            taken: Boolean scalar, whether the update was taken.
            bad_samples: Boolean, shape (B,), samples whose own loss is not finite.
            keys: B sample keys.
        """
        self.check()
        ready = None
        if taken.device.type == "cuda":
            taken, bad_samples = taken.to("cpu", non_blocking=True), bad_samples.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending = _Pending(step, taken, bad_samples, tuple(keys), ready)

    def check(self) -> None:
        """Read the flags that were noted last. Raises DistillError after too many bad steps in a row."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.ready is not None:
            pending.ready.synchronize()
        if bool(pending.taken):
            self.consecutive = 0
            self._names.clear()
            return
        self.consecutive += 1
        self.total += 1
        named = [key for key, bad in zip(pending.keys, pending.bad_samples.tolist(), strict=True) if bad]
        self._names.update(named or pending.keys)
        if self.consecutive >= self._max:
            raise DistillError(self._message(pending.step))

    def _message(self, step: int) -> str:
        names = ", ".join(key for key, _ in self._names.most_common(10))
        return (
            f"the loss or its gradient was not finite in {self.consecutive} optimizer steps in a row (the last is step "
            f"{step}); no such update was taken. Samples involved: {names}\n"
            "  lower learning_rate, use mixed_precision=bf16 or no instead of fp16, or look at these samples"
        )
