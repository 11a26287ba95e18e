"""Tensors of which each process holds a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return True if each process holds a part of `tensor` alone."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def part_of(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, on the same storage; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def parts_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Return each sharded parameter with its part, a parameter for optimizers that know nothing of shards."""
    return {p: nn.Parameter(part_of(p), requires_grad=p.requires_grad) for p in parameters if is_sharded(p)}


def sharded_as(part: Tensor, like: Tensor) -> Tensor:
    """Return `part`, on the same storage, as this process's part of a tensor sharded as `like`."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, or the tensor itself; every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def whole_on_host(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return copies of whole tensors in host memory, gathered one by one; every process must call it.

    Args:
        tensors: Sharded or not.
        keep: Whether this process keeps them; the others help, and get nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if keep:
            found[name] = gathered.to("cpu", copy=not is_sharded(tensor))
    return found


@torch.no_grad()
def fill_from_whole(tensor: Tensor, saved: Tensor) -> None:
    """Write this process's part of a whole tensor into `tensor`, sharded or not."""
    if not is_sharded(tensor):
        tensor.copy_(saved)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    slices = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    part_of(tensor).copy_(saved[slices])
