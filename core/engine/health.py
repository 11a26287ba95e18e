"""Detects losses that are not finite, without synchronising the device: each step's flag is read one step later."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DistillError

logger = logging.getLogger(__name__)
NAMED = 10
"""Samples that are named."""
SCALE_HALVINGS = 16
"""Updates in a row that the search for fp16's loss scale may take, from 65,536 down to 1."""
ENOUGH = 4
"""Samples of a first step of which none has a finite loss, and the data is not at fault."""


@dataclass(frozen=True)
class _Pending:
    role: str
    step: int
    flags: Tensor
    """Whether the update was taken, whether its loss was finite, and which samples' own losses are not; (2 + B,)."""
    keys: tuple[str, ...]
    ready: torch.cuda.Event | None
    first: bool
    """Whether it is the first update of its role in this process."""


class HealthMonitor:
    """Counts withheld updates and ends the run, naming the samples, when there are too many.

    Args:
        max_bad_steps: Consecutive withheld updates after which the run stops.
        max_bad_share: Share of a role's updates that may be withheld in all; :meth:`finish` compares with it.
        gather: Gathers a value from every process: all withhold the same updates, for samples of their own.
        scaled: Whether losses are scaled for fp16. The scale is found by trying: a gradient that is not finite, of a
            loss that is, is no fault of model or data: it does not count in the share, nor in a row of up to 16.
    """

    def __init__(
        self,
        max_bad_steps: int,
        *,
        max_bad_share: float = 1.0,
        gather: Callable[[Any], list[Any]] = lambda own: [own],
        scaled: bool = False,
    ) -> None:
        self._max, self._max_share, self._gather, self._scaled = max_bad_steps, max_bad_share, gather, scaled
        self._pending: list[_Pending] = []
        self._names: Counter[str] = Counter()
        self._last_bad: dict[str, int] = {}
        self._seen: set[str] = set()
        self._first_bad: list[_Pending] = []
        self.consecutive: dict[str, int] = {}
        self._searching: Counter[str] = Counter()
        self.updates: Counter[str] = Counter()
        """Updates of each role, since the first step of the run."""
        self.bad: Counter[str] = Counter()
        """Those of them that were withheld and count in the share."""
        self.total = 0

    def record(
        self,
        role: str,
        step: int,
        taken: Tensor,
        bad_samples: Tensor,
        keys: Sequence[str],
        *,
        finite_loss: Tensor | None = None,
    ) -> None:
        """Note a step's flags; :meth:`check` reads them, before the next step begins.

        Args:
            role: The role that was updated.
            step: Optimizer step.
            taken: Boolean scalar, whether the update was taken.
            bad_samples: Boolean, shape (B,), samples whose own loss is not finite.
            keys: B sample keys.
            finite_loss: Boolean scalar, whether the loss was finite; None where only `taken` is known.
        """
        ready, finite = None, taken if finite_loss is None else finite_loss
        flags = torch.cat([torch.stack([taken, finite]), bad_samples])
        if flags.device.type == "cuda":
            flags = flags.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Pending(role, step, flags, tuple(keys), ready, role not in self._seen))
        self._seen.add(role)

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts, those of the last step included."""
        self._read_all()
        return {
            "consecutive": dict(self.consecutive), "searching": dict(self._searching),
            "updates": dict(self.updates), "bad": dict(self.bad),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on with counts that :meth:`state_dict` returned."""
        self.consecutive = dict(state["consecutive"])
        self._searching = Counter(state["searching"])
        self.updates, self.bad = Counter(state["updates"]), Counter(state["bad"])

    def check(self) -> None:
        """Read the flags that were noted last. Raises DistillError after too many bad steps in a row, and when the very
        first loss is not finite for any sample.
        """
        self._read_all()
        found, self._first_bad = self._first_bad, []
        for pending in found:
            self._warn(pending)
        for role, count in self.consecutive.items():
            if count - min(self._searching[role], SCALE_HALVINGS) >= self._max:
                raise DistillError(self._message(role))

    def finish(self) -> None:
        """Say how many updates were not taken. Raises DistillError if a role has too many of them."""
        self.check()
        for role in self.updates:
            bad, updates = self.bad[role], self.updates[role]
            if not bad:
                continue
            line = (
                f"{bad:,} of the {updates:,} updates of the {role} ({bad / updates:.1%}) were not taken, because loss "
                "or gradient was not finite"
            )
            if bad > self._max_share * updates:
                raise DistillError(
                    f"{line}: more than max_bad_share = {self._max_share:g}, so no student is written."
                    f"{self._involved()}\n"
                    "  find the cause (docs/troubleshooting.md, The loss is NaN) and train anew; or, to have the "
                    "student all the same, go on with max_bad_share=1"
                )
            logger.warning(f"{line}.{self._involved()}")

    def _read_all(self) -> None:
        noted, self._pending = self._pending, []
        for pending in noted:
            self._read(pending)

    def _read(self, pending: _Pending) -> None:
        if pending.ready is not None:
            pending.ready.synchronize()
        role = pending.role
        self.updates[role] += 1
        taken, finite, *bad = pending.flags.tolist()
        if taken:
            self.consecutive[role] = self._searching[role] = 0
            return
        self.consecutive[role] = self.consecutive.get(role, 0) + 1
        self.total += 1
        self._last_bad[role] = pending.step
        self._names.update([key for key, is_bad in zip(pending.keys, bad, strict=True) if is_bad] or pending.keys)
        if self._scaled and finite:
            self._searching[role] += 1
            return
        self.bad[role] += 1
        if pending.first or self.bad[role] == 1:
            self._first_bad.append(pending)

    def _warn(self, pending: _Pending) -> None:
        """Say that an update is not taken, the first time. Raises DistillError if nothing about its step is finite."""
        role, step, bad = pending.role, pending.step, pending.flags[2:]
        counts = torch.tensor(self._gather((len(bad), int(bad.sum())))).sum(0)
        if pending.first and ENOUGH <= int(counts[0]) == int(counts[1]):
            raise DistillError(
                f"the {role}'s first loss (step {step}) is not finite for any sample: the model, its LoRAs or a "
                "setting are at fault, not the data\n"
                "  look at pretrained_model_name_or_path, teacher_lora and init_lora, and use mixed_precision=bf16 or "
                "no instead of fp16"
            )
        logger.warning(
            f"step {step}: the {role}'s loss or gradient is not finite, and the update is not taken."
            f"{self._involved()} The end of the run says how often this happened"
        )

    def _involved(self) -> str:
        every = sum(self._gather(self._names), Counter[str]())
        names = ", ".join(key for key, _ in every.most_common(NAMED))
        return f" Samples involved: {names}." if names else ""

    def _message(self, role: str) -> str:
        last = f" (the last is step {self._last_bad[role]})" if role in self._last_bad else ""
        return (
            f"the {role}'s loss or gradient was not finite {self.consecutive[role]} times in a row{last}; no such "
            f"update was taken.{self._involved().removesuffix('.')}\n"
            "  lower learning_rate, use mixed_precision=bf16 or no instead of fp16, or look at these samples"
        )
