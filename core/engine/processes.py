"""The processes of a run, through accelerate: device, rank, and averaging of gradients.

The engine itself averages the gradients of the role that was stepped, since several adapters on one base are more
than a DDP reducer or a DeepSpeed engine expects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..errors import DistillError, Interrupted, UserError, described
from .launch import check_launch, watch_launcher

BUCKET_BYTES = 64 * 2**20


class Processes:
    """Rank, world size, device and collective operations.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ...
    """

    def __init__(self, device: str = "auto") -> None:
        from accelerate import PartialState

        cpu = device == "cpu" or (device == "auto" and not _has_accelerator())
        # the first process validates, exports and scores while the others wait: that may take hours
        self._state = PartialState(cpu=cpu, timeout=timedelta(days=7))
        self._earlier: Tensor | None = None
        check_launch(os.environ, world_size=self._state.num_processes)
        watch_launcher(world_size=self._state.num_processes)
        own = device in ("auto", "cpu", "cuda") and self._state.device is not None
        self.device = torch.device(self._state.device or "cpu") if own else torch.device(device)
        self.rank, self.world_size = self._state.process_index, self._state.num_processes
        self.main = self._state.is_main_process

    @property
    def described(self) -> str:
        """The processes in a line, for logs; empty for one alone."""
        if self.world_size == 1:
            return ""
        backend = torch.distributed.get_backend()
        return f"{self.world_size} processes over {backend}: the base on each, gradients averaged"

    def close(self) -> None:
        """Leave the process group; otherwise a process that ends early aborts the others' exit."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all processes."""
        self._state.wait_for_everyone()

    def synchronized(self) -> AbstractContextManager[None]:
        """Return a block that all processes leave together, or with the error of the one that failed in it."""
        return synchronized()

    def gather(self, own: Any) -> list[Any]:
        """Return each process's value, by rank; every process must call it."""
        return gathered(own) if self.world_size > 1 else [own]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average `tensors` over the processes, in place, in buckets of one type."""
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            flat = _flatten_dense_tensors(bucket)
            torch.distributed.all_reduce(flat)
            flat.div_(self.world_size)
            for tensor, averaged in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                tensor.copy_(averaged)

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is set in any process; every process must call it."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return bool(tensor.item())

    def greatest_so_far(self, *numbers: int) -> list[int]:
        """Return the greatest of each number over all processes at the previous call, so that the call never waits
        for the device; of one process alone, its numbers.

        Every process must call it equally often, with equally many numbers.
        """
        if self.world_size == 1:
            return list(numbers)
        found = [0] * len(numbers) if self._earlier is None else self._earlier.tolist()
        tensor = torch.tensor([int(number) for number in numbers], device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        self._earlier = tensor.to("cpu", non_blocking=True)
        return found


def in_group() -> bool:
    """Return True if this process is one of several in a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(own: Any) -> list[Any]:
    """Return the value of each process of the group, by rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


@contextmanager
def synchronized() -> Iterator[None]:
    """Make all processes leave the block together; an error in one ends it in all, with the same message.

    Without it, a failure of one process leaves the others waiting for it at their next exchange. Inside the block no
    process may wait for another; every process must enter it.
    """
    own: BaseException | None = None
    try:
        yield
    except BaseException as error:  # raised below, once the others know
        own = error
    failures = [] if not in_group() else [each for each in gathered(None if own is None else _summary(own)) if each]
    if own is not None:
        raise own
    if failures:
        raise _retold(*failures[0])


def _summary(error: BaseException) -> tuple[int, str]:
    """Return exit code and text of an error, since errors themselves may not be picklable."""
    if isinstance(error, DistillError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code, "interrupted"
    return DistillError.exit_code, f"another process failed: {described(error)}"


def _retold(exit_code: int, text: str) -> DistillError:
    kinds = {kind.exit_code: kind for kind in (DistillError, UserError, Interrupted)}
    return kinds.get(exit_code, DistillError)(text)


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for group in by_type.values():
        size, bucket = 0, []
        for tensor in group:
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= BUCKET_BYTES:
                buckets.append(bucket)
                size, bucket = 0, []
        if bucket:
            buckets.append(bucket)
    return buckets
