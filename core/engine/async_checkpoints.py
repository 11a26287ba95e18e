"""Checkpoints that are written while training goes on.

Training stops only while the state is copied into memory of the host; a thread writes, syncs, hashes and renames that
copy. One save is under way at a time, so that one buffer serves them all.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..utils.memory import free_memory_bytes, gigabytes
from .checkpoint import CheckpointState, CheckpointStore

logger = logging.getLogger(__name__)
ALIGNMENT = 64
"""Bytes that each tensor's place in the buffer is a multiple of."""
SPARE_BYTES = 1 << 30
"""Memory of the host that a new buffer leaves free."""


class StagingBuffer:
    """Memory of the host that states are copied into, the same from save to save."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._pinned: int | None = None

    def stage(self, state: CheckpointState) -> CheckpointState | None:
        """Return a copy of `state` that no step changes; the copy before it is overwritten.

        Every tensor is a storage of its own, so that writing it needs no further copy. On CUDA the copies run at once
        out of pinned memory, and the host waits for them one time.

        Returns:
            The copy; None where the host has no room for one.
        """
        if not self._reserve(sum(map(_room, _tensors(state))), pinned=any(t.is_cuda for t in _tensors(state))):
            return None
        offset, groups = 0, dict[str, dict[str, Tensor]]()
        for group, tensors in state.tensors.items():
            groups[group] = {}
            for name, tensor in tensors.items():
                groups[group][name] = self._copy(tensor.detach(), offset)
                offset += _room(tensor)
        for device in {tensor.device for tensor in _tensors(state) if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return CheckpointState(state.step, groups, state.meta)

    def _copy(self, tensor: Tensor, offset: int) -> Tensor:
        if tensor.numel() == 0:
            return tensor.cpu()
        assert self._memory is not None
        place = torch.frombuffer(self._memory, dtype=torch.uint8, count=tensor.nbytes, offset=offset)
        copy = place.view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor, non_blocking=tensor.is_cuda)

    def _reserve(self, num_bytes: int, *, pinned: bool) -> bool:
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
        if int(torch.cuda.cudart().cudaHostRegister(address, len(self._memory), 0)) == 0:
            self._pinned = address

    def _release(self) -> None:
        if self._pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned)
        self._memory = self._pinned = None


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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(self, state: CheckpointState) -> None:
        """Begin to save `state`, which may change as soon as this returns; the save before must be finished.

        Without room for a copy the checkpoint is written before this returns.
        """
        assert self._running is None, "the save before is not finished"
        staged = self._buffer.stage(state) if self.enabled else None
        if staged is None:
            if self.enabled:
                self._say_why(state)
            self.store.save(state)
            return
        self._running = self._pool.submit(self._save, staged)

    def _save(self, staged: CheckpointState) -> None:
        self.store.save(staged)

    def _say_why(self, state: CheckpointState) -> None:
        needed = gigabytes(sum(map(_room, _tensors(state))))
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


def _tensors(state: CheckpointState) -> Iterator[Tensor]:
    groups: Mapping[str, Mapping[str, Tensor]] = state.tensors
    for tensors in groups.values():
        yield from tensors.values()


def _room(tensor: Tensor) -> int:
    """Return the bytes of the buffer that a tensor takes."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
