"""The processes of a run, through accelerate: device, rank, and averaging of gradients.

The engine itself averages the gradients of the role that was stepped, since several adapters on one base are more
than a DDP reducer or a DeepSpeed engine expects.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..errors import DistillError
from .heartbeats import Heartbeats, connected, meeting, retold, summary
from .launch import check_launch, watch_launcher

BUCKET_BYTES = 64 * 2**20
POLL_SECONDS = 0.5
"""Time between two looks at the other processes while an exchange is waited for."""


class Processes:
    """Rank, world size, device and collective operations.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ...
        timeout_seconds: Silence after which a process is lost and the others end; 0 for no limit.
    """

    def __init__(self, device: str = "auto", *, timeout_seconds: float = 0.0) -> None:
        from accelerate import PartialState

        cpu = device == "cpu" or (device == "auto" and not _has_accelerator())
        # the first process validates, exports and scores while the others wait, which may take hours: heartbeats tell
        # that from one that hangs
        with meeting(timeout_seconds):
            self._state = PartialState(cpu=cpu, timeout=timedelta(days=7))
            self.rank, self.world_size = self._state.process_index, self._state.num_processes
            if self.world_size > 1:
                _listen(connected(rank=self.rank, world_size=self.world_size, timeout_seconds=timeout_seconds))
        self._earlier: Tensor | None = None
        check_launch(os.environ, world_size=self._state.num_processes)
        watch_launcher(world_size=self._state.num_processes)
        own = device in ("auto", "cpu", "cuda") and self._state.device is not None
        self.device = torch.device(self._state.device or "cpu") if own else torch.device(device)
        self.main = self._state.is_main_process

    @property
    def described(self) -> str:
        """The processes in a few words, for logs."""
        if self.world_size == 1:
            return "one process"
        return f"{self.world_size} processes over {torch.distributed.get_backend()}"

    def require_group(self) -> None:
        """Make a process group of this process alone, unless there is one; sharded weights live in one."""
        if not torch.distributed.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)

    @property
    def heartbeats(self) -> Heartbeats | None:
        """The signs of life of the processes; None for one alone."""
        return _heartbeats if self.world_size > 1 else None

    def fail(self, error: BaseException) -> None:
        """Tell the other processes that this one ends, and with what: they end with it."""
        if self.heartbeats is not None:
            self.heartbeats.end(error)

    def reason(self, error: BaseException) -> DistillError | None:
        """Return the loss of a process that `error` comes from, in an exchange of FSDP or DeepSpeed; else None."""
        return None if self.heartbeats is None else self.heartbeats.reason(error)

    def close(self) -> None:
        """Leave the process group; otherwise a process that ends early aborts the others' exit."""
        if not in_group():
            return
        hanging = self.heartbeats is not None and self.heartbeats.hanging
        _listen(None)
        if hanging:  # leaving would wait for the one that hangs, as would the interpreter at its end
            atexit.register(_exit_at_once, DistillError.exit_code)
        else:
            torch.distributed.destroy_process_group()

    def training(self) -> AbstractContextManager[None]:
        """Return a block in which a process that stays at one step, and is waited for, is lost."""
        return self.heartbeats.training() if self.heartbeats is not None else nullcontext()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size == 1:
            return
        _meet()
        with _exchange():
            torch.distributed.barrier()

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
        for bucket in buckets_of(tensors):
            Averaging(bucket).finish()

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is set in any process; every process must call it."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(int(flag), device=self.device)
        _greatest(tensor)
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
        _greatest(tensor)
        self._earlier = tensor.to("cpu", non_blocking=True)
        return found


class Averaging:
    """The average over the processes of tensors of one type, in one exchange that goes on until it is finished.

    Args:
        tensors: Equally many of equal shapes on every process.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._flat = _flatten_dense_tensors(self._tensors)
        with _exchange():
            self._work = torch.distributed.all_reduce(self._flat, async_op=True)

    def finish(self) -> None:
        """Wait for the exchange, and put the averages in the tensors' place."""
        with _exchange():
            _wait(self._work)
        self._flat.div_(torch.distributed.get_world_size())
        for tensor, averaged in zip(self._tensors, _unflatten_dense_tensors(self._flat, self._tensors), strict=True):
            tensor.copy_(averaged)


def in_group() -> bool:
    """Return True if this process is one of several in a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(own: Any) -> list[Any]:
    """Return the value of each process of the group, by rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    _meet()
    with _exchange():
        torch.distributed.all_gather_object(found, own)
    return found


@contextmanager
def synchronized() -> Iterator[None]:
    """Make all processes leave the block together; an error in one ends it in all, with the same message.

    Without it, a failure of one process leaves the others waiting for it at their next exchange. Inside the block no
    process may wait for another; every process must enter it.
    """
    alone = nullcontext() if _heartbeats is None else _heartbeats.alone()
    with left_together(lambda own: gathered(own) if in_group() else [own]), alone:
        yield


@contextmanager
def left_together(gather: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Raise, when the block has ended in all processes, the error of one in all of them.

    Args:
        gather: Returns each process's value by rank, once all have called it.
    """
    own: BaseException | None = None
    try:
        yield
    except BaseException as error:  # raised below, once the others know
        own = error
    failures = [each for each in gather(None if own is None else _summary(own)) if each]
    if own is not None:
        raise own
    if failures:
        raise retold(*failures[0])


def _summary(error: BaseException) -> tuple[int, str]:
    return summary(error, rank=torch.distributed.get_rank() if in_group() else 0)


class BesideTraining:
    """Exchanges of a thread while training goes on: by connections of their own, over gloo, in no stream of a device.

    Every process must make one, and take part in each of its exchanges.

    Args:
        processes: Those of the run.
    """

    def __init__(self, processes: Processes) -> None:
        self._alone = processes.world_size == 1
        with nullcontext() if self._alone else _exchange():
            group = None if self._alone else torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        self._group: Any = group

    def gather(self, own: Any) -> list[Any]:
        """Return each process's value, by rank."""
        if self._alone:
            return [own]
        found: list[Any] = [None] * torch.distributed.get_world_size()
        with nullcontext() if _heartbeats is None else _heartbeats.exchange_beside():
            _poll(torch.distributed.barrier(group=self._group, async_op=True), beside=True)
            torch.distributed.all_gather_object(found, own, group=self._group)
        return found

    def synchronized(self) -> AbstractContextManager[None]:
        """Return a block that all processes leave together, or with the error of the one that failed in it."""
        return left_together(self.gather)


_heartbeats: Heartbeats | None = None


def _listen(heartbeats: Heartbeats | None) -> None:
    """Let all exchanges of this process heed `heartbeats`."""
    global _heartbeats
    if _heartbeats is not None:
        _heartbeats.close()
    _heartbeats = heartbeats


def _exchange() -> AbstractContextManager[None]:
    return nullcontext() if _heartbeats is None else _heartbeats.exchange()


def _greatest(tensor: Tensor) -> None:
    with _exchange():
        _wait(torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, async_op=True))


def _meet() -> None:
    """Wait for all processes where the wait can be ended when one is lost."""
    if torch.distributed.get_backend() == "gloo":
        with _exchange():
            _wait(torch.distributed.barrier(async_op=True))


def _wait(work: Any) -> None:
    """Wait for an exchange: over NCCL for its place in the stream, over gloo until it is done or a process is lost."""
    if torch.distributed.get_backend() != "gloo":
        work.wait()
    else:
        _poll(work)


def _poll(work: Any, *, beside: bool = False) -> None:
    """Wait for an exchange over gloo until it is done or a process is lost; `beside` the main thread or in it."""
    while _heartbeats is not None and not work.is_completed():
        try:
            work.wait(timedelta(seconds=POLL_SECONDS))
        except RuntimeError:  # after that time; an error of the exchange itself completes it
            if not work.is_completed():
                _heartbeats.check(beside=beside)
    work.wait()


def _exit_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def buckets_of(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in groups of one type and of about `BUCKET_BYTES`, in their order."""
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
