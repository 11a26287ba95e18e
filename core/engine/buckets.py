"""Gradients that every process holds whole, averaged in flat buckets while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .optimize import RoleOptimizer
from .processes import buckets_of

if TYPE_CHECKING:
    from .processes import Processes


class _Bucket:
    """Parameters whose gradients are exchanged together."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.begin()

    def begin(self) -> None:
        """Wait for the gradients of another backward pass."""
        self.missing = len(self.parameters)
        self._flat: Tensor | None = None
        self._work: Any = None

    def launch(self) -> None:
        """Begin to sum the gradients over the processes; parameters that got none are left out, on all of them."""
        self._gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self._gradients:
            self._flat = _flatten_dense_tensors(self._gradients)
            self._work = torch.distributed.all_reduce(self._flat, async_op=True)

    def finish(self, world_size: int) -> None:
        """Wait for the sum, and put the averages in the gradients' place."""
        if self._flat is None:
            return
        self._work.wait()
        self._flat.div_(world_size)
        for gradient, averaged in zip(
            self._gradients, _unflatten_dense_tensors(self._flat, self._gradients), strict=True
        ):
            gradient.copy_(averaged)


class AveragingOptimizer(RoleOptimizer):
    """The optimizer of a role that every process holds whole.

    In the backward pass of a step's last micro-batch the gradients of a bucket are exchanged as soon as all of them are
    there. Buckets are exchanged in one order on every process: that in which their gradients usually come.

    Args:
        optimizer: A torch optimizer over `parameters`.
        parameters: Whole on every process.
        processes: More than one.
        settings: Those of :class:`RoleOptimizer`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        processes: Processes,
        **settings: Any,
    ) -> None:
        super().__init__(optimizer, parameters, **settings)
        self._world_size = processes.world_size
        self._buckets = [_Bucket(bucket) for bucket in buckets_of(self.parameters[::-1])]
        self._of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._waiting: list[_Bucket] = []
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
            self._waiting.pop(0).launch()

    def gradients_to_average(self) -> list[Tensor]:
        """Wait for the averages; return nothing, since none is left to be averaged."""
        while self._waiting:  # of parameters that the loss does not depend on
            self._waiting.pop(0).launch()
        for bucket in self._buckets:
            bucket.finish(self._world_size)
        return []
