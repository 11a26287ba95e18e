"""Gradients that every process holds whole, averaged in flat buckets while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .optimize import RoleOptimizer
from .processes import Averaging, buckets_of

IN_FLIGHT = 4
"""Buckets that are exchanged at a time, each in memory of its own beside the gradients."""


class _Bucket:
    """Parameters whose gradients are exchanged together."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.begin()

    def begin(self) -> None:
        """Wait for the gradients of another backward pass."""
        self.missing = len(self.parameters)
        self._averaging: Averaging | None = None

    def launch(self) -> None:
        """Begin to average the gradients; parameters that got none are left out, on all processes."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            self._averaging = Averaging(gradients)

    def finish(self) -> None:
        """Wait for the averages, in the gradients' place."""
        averaging, self._averaging = self._averaging, None
        if averaging is not None:
            averaging.finish()


class AveragingOptimizer(RoleOptimizer):
    """The optimizer of a role that every process holds whole.

    In the backward pass of a step's last micro-batch the gradients of a bucket are exchanged as soon as all of them are
    there. Buckets are exchanged in one order on every process: that in which their gradients usually come.

    Args:
        optimizer: A torch optimizer over `parameters`.
        parameters: Whole on every process.
        settings: Those of :class:`RoleOptimizer`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], **settings: Any) -> None:
        super().__init__(optimizer, parameters, **settings)
        self._buckets = [_Bucket(bucket) for bucket in buckets_of(self.parameters[::-1])]
        self._of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._waiting: list[_Bucket] = []
        self._launched: list[_Bucket] = []
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of `loss`; with the last one of the step the exchange begins."""
        if last:
            self._waiting = list(self._buckets)
            for bucket in self._buckets:
                bucket.begin()
        super().backward(loss, last=last)

    def _arrived(self, parameter: Tensor) -> None:
        if not self._waiting:
            return
        self._of[parameter].missing -= 1
        while self._waiting and not self._waiting[0].missing:
            self._launch_next()

    def _launch_next(self) -> None:
        while len(self._launched) >= IN_FLIGHT:
            self._launched.pop(0).finish()
        self._launched.append(self._waiting.pop(0))
        self._launched[-1].launch()

    def gradients_to_average(self) -> list[Tensor]:
        """Wait for the averages; return nothing, since none is left to be averaged."""
        while self._waiting:  # of parameters that the loss does not depend on
            self._launch_next()
        while self._launched:
            self._launched.pop(0).finish()
        return []
