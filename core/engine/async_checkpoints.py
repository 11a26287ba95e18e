"""Checkpoints that are written while training goes on.

A save begins with a copy of the state in memory of the host. What a forward pass may change is copied before training
goes on; what optimizer steps alone change (weights, moments, averages) is copied by a thread while the next step makes
its gradients, and that step waits for the copy before it changes anything. The thread then writes, syncs and hashes the
copy. One save is under way at a time, so that one buffer serves them all. Of sharded tensors each process copies and
writes its own parts, and the threads agree among themselves.
"""

from __future__ import annotations

import copy
import logging
import mmap
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..utils.memory import free_memory_bytes, gigabytes
from .checkpoint import CheckpointState, CheckpointStore
from .sharded_checkpoint import Groups

logger = logging.getLogger(__name__)
ALIGNMENT = 64
"""Bytes that each tensor's place in the buffer is a multiple of."""
PORTABLE = 1
"""CUDA's flag for pinned memory that every device can use."""
SPARE_BYTES = 1 << 30
"""Memory of the host that a new buffer leaves free."""


class StagingBuffer:
    """Memory of the host that states are copied into, the same from save to save."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._pinned: int | None = None
        self._used = 0

    def reserve(self, state: CheckpointState) -> CheckpointState | None:
        """Return a state of the same tensors with other values, in the place of the one returned before.

        Every tensor is a storage of its own, so that writing it needs no further copy. For tensors of CUDA the memory
        is pinned. What is a copy already is in the returned state as it is.

        Returns:
            The places to copy to; None where the host has no room for them.
        """
        copied = _copied(state)
        if not self._grow(sum(map(_room, copied)), pinned=any(tensor.is_cuda for tensor in copied)):
            return None
        self._used = 0
        whole, parts = map(self._places, _to_copy(state))
        groups = {
            group: {
                name: tensor if (group, name) in state.copies else whole[group][name] for name, tensor in own.items()
            }
            for group, own in state.tensors.items()
        }
        sharded = None if state.sharded is None else state.sharded.copied_to(parts)
        return CheckpointState(state.step, groups, copy.deepcopy(state.meta), sharded, state.copies)

    def _places(self, groups: Groups) -> Groups:
        """Return a place for each tensor, behind those that were given before."""
        found: Groups = {}
        for group, tensors in groups.items():
            found[group] = {}
            for name, tensor in tensors.items():
                found[group][name] = self._place(tensor, self._used)
                self._used += _room(tensor)
        return found

    def _place(self, tensor: Tensor, offset: int) -> Tensor:
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        assert self._memory is not None
        place = torch.frombuffer(self._memory, dtype=torch.uint8, count=tensor.nbytes, offset=offset)
        return place.view(tensor.dtype).view(tensor.shape)

    def _grow(self, num_bytes: int, *, pinned: bool) -> bool:
        """Return True if there are `num_bytes` now, taken from the host where there were fewer."""
        if self._memory is not None and len(self._memory) >= num_bytes:
            return True
        held = 0 if self._memory is None else len(self._memory)
        if num_bytes + SPARE_BYTES > free_memory_bytes() + held:
            return False
        self._release()
        self._memory = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE))
        if pinned:
            self._pin()
        return True

    def _pin(self) -> None:
        """Make copies from the device direct; where the system refuses that, they are slower and as right."""
        assert self._memory is not None
        address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        runtime: Any = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(address, len(self._memory), PORTABLE)) == 0:
            self._pinned = address

    def _release(self) -> None:
        if self._pinned is not None:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self._pinned)
        self._memory = self._pinned = None


Copies = list[tuple[Tensor, Tensor]]
"""Places and the tensors that are copied there."""


class BackgroundSaves:
    """The saves of one store, each begun where training is and finished by a thread.

    Args:
        store: Writes the checkpoints.
        enabled: Whether they are written by a thread; else :meth:`begin` writes them.
    """

    def __init__(self, store: CheckpointStore, *, enabled: bool = True) -> None:
        self.store, self.enabled = store, enabled
        self._buffer = StagingBuffer()
        self._running: Future[None] | None = None
        self._copied = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(
        self,
        state: CheckpointState,
        *,
        stepped: Callable[[str, str], bool] = lambda group, name: False,
        waits: bool = False,
    ) -> None:
        """Begin to save `state`; the save before must be finished.

        Without room for a copy, and where nobody trains meanwhile, the checkpoint is written before this returns.

        Args:
            state: What is saved.
            stepped: Tells of a group and a name whether that tensor stays as it is until :meth:`wait_copied` returns;
                any other may change as soon as this returns.
            waits: Training waits for this save in any case.
        """
        assert self._running is None, "the save before is not finished"
        beside = self.enabled and not waits
        staged = self._buffer.reserve(state) if beside else None
        if staged is None:
            if beside:
                self._say_why(state)
            self.store.save(state)
            return
        now, later = _pairs(state, staged, stepped)
        _copy(now, {})
        _synchronize(now)
        ready = {t.device: torch.cuda.current_stream(t.device).record_event() for _, t in later if t.is_cuda}
        self._copied.clear()
        self._running = self._pool.submit(self._save, staged, later, ready)

    def wait_copied(self) -> None:
        """Wait until the save under way no longer needs the tensors that it was given."""
        if self._running is not None:
            self._copied.wait()

    def _save(self, staged: CheckpointState, later: Copies, ready: Mapping[torch.device, Any]) -> None:
        try:
            _copy(later, ready)
        finally:
            later.clear()
            self._copied.set()
        self.store.save(staged)

    def _say_why(self, state: CheckpointState) -> None:
        needed = gigabytes(sum(map(_room, _copied(state))))
        logger.info(
            f"checkpoint-{state.step} is written while training waits: a copy of it takes {needed} of memory, and "
            f"{gigabytes(free_memory_bytes())} are free"
        )

    @property
    def ended(self) -> bool:
        """Return True if no save is under way: the last one is complete, or has failed."""
        return self._running is None or self._running.done()

    def finish(self) -> None:
        """Wait until the save under way is complete; raises what it failed with."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def _pairs(
    state: CheckpointState, staged: CheckpointState, stepped: Callable[[str, str], bool]
) -> tuple[Copies, Copies]:
    """Return what is copied before training goes on, and what is copied while it does."""
    now, later = Copies(), Copies()
    for live, targets in zip(_to_copy(state), _to_copy(staged), strict=True):
        for group, tensors in live.items():
            for name, tensor in tensors.items():
                waits = stepped(group, name) and tensor.device.type in ("cpu", "cuda")
                (later if waits else now).append((targets[group][name], tensor.detach()))
    return now, later


def _copy(pairs: Copies, ready: Mapping[torch.device, Any]) -> None:
    """Copy tensors to their places.

    Args:
        pairs: Both.
        ready: Device -> what its copies wait for; they run on a stream of their own, and are done when this returns.
    """
    for place, tensor in pairs:
        if tensor.device not in ready:
            place.copy_(tensor, non_blocking=tensor.is_cuda)
    for device, event in ready.items():
        stream = torch.cuda.Stream(device)
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            for place, tensor in pairs:
                if tensor.device == device:
                    place.copy_(tensor, non_blocking=True)
        stream.synchronize()


def _synchronize(pairs: Copies) -> None:
    """Wait for the copies that run on devices, once for each."""
    for device in {tensor.device for _, tensor in pairs if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _to_copy(state: CheckpointState) -> tuple[Groups, Groups]:
    """Return the tensors that every process has, copies left out, and this process's parts of the sharded ones."""
    whole: Groups = {
        group: {name: tensor for name, tensor in tensors.items() if (group, name) not in state.copies}
        for group, tensors in state.tensors.items()
    }
    return whole, {} if state.sharded is None else state.sharded.parts


def _copied(state: CheckpointState) -> list[Tensor]:
    return [tensor for groups in _to_copy(state) for group in groups.values() for tensor in group.values()]


def _room(tensor: Tensor) -> int:
    """Return the bytes of the buffer that a tensor takes."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
