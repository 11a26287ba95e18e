"""The memory that a computation would take, counted on the meta device: tensors are made and freed, values are not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._live.pop(key)


class _FusedAttention(TorchFunctionMode):
    """Gives attention on the meta device the memory of the fused kernels that real devices have: no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that tensors made during `call` hold at a time; what kernels use inside is not seen.

    Args:
        call: Computes on tensors of the meta device, or of any other.
    """
    with torch.no_grad(), _FusedAttention(), _Allocations() as allocations:
        call()
    return allocations.peak


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in dicts, lists and tuples, of those made of other tensors by their parts."""
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    if is_traceable_wrapper_subclass(value):
        return sum(tensor_bytes(getattr(value, part)) for part in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
