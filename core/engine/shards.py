"""Tensors of which each process holds a part."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FlatShard(Tensor):
    """A tensor of which each process holds as many consecutive elements, the last ones with padding behind.

    DeepSpeed's third stage cuts weights in this way. Nothing can be computed with it.

    Args:
        part: This process's elements, shape (ceil(n / processes),), on the storage that they have.
        shape: The whole tensor's shape.
    """

    part: Tensor

    @staticmethod
    def __new__(cls: type[FlatShard], part: Tensor, shape: torch.Size) -> FlatShard:
        """Return a tensor of that shape without memory of its own."""
        return Tensor._make_wrapper_subclass(cls, shape, dtype=part.dtype, device=part.device)

    def __init__(self, part: Tensor, shape: torch.Size) -> None:
        self.part = part

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Detach; refuse everything else."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].part.detach(), args[0].shape)
        raise NotImplementedError(f"{func} of a tensor of which this process holds a part")

    def gather(self) -> Tensor:
        """Return the whole; every process must call it."""
        world = torch.distributed.get_world_size()
        own = self.part.detach().to(communicating_device(self.part)).contiguous()
        flat = own.new_empty(world * own.numel())
        torch.distributed.all_gather(list(flat.chunk(world)), own)
        return flat[: self.numel()].view(self.shape)

    def fill(self, saved: Tensor) -> None:
        """Write this process's elements of the whole tensor `saved` into the part."""
        size = self.part.numel()
        mine = saved.reshape(-1)[torch.distributed.get_rank() * size :][:size]
        self.part.detach()[: mine.numel()].copy_(mine)


def communicating_device(tensor: Tensor) -> torch.device:
    """Return where a tensor must lie for the processes to exchange it."""
    on_cuda = "nccl" in torch.distributed.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else tensor.device


def is_sharded(tensor: Tensor) -> bool:
    """Return True if each process holds a part of `tensor` alone."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor | FlatShard) or _is_partitioned(tensor)


def _is_partitioned(tensor: Tensor) -> bool:
    """Return True if `tensor` is a weight that DeepSpeed has cut, whose own memory comes and goes."""
    return getattr(tensor, "ds_tensor", None) is not None


@torch.no_grad()
def part_of(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, on the same storage; any other tensor itself."""
    if _is_partitioned(tensor):
        return tensor.ds_tensor.data  # type: ignore[attr-defined]
    if isinstance(tensor, FlatShard):
        return tensor.part
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def parts_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Return each sharded parameter with its part, a parameter for optimizers that know nothing of shards."""
    return {p: nn.Parameter(part_of(p), requires_grad=p.requires_grad) for p in parameters if is_sharded(p)}


def sharded_as(part: Tensor, like: Tensor) -> Tensor:
    """Return `part`, on the same storage, as this process's part of a tensor sharded as `like`."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    if _is_partitioned(like):
        return FlatShard(part, like.ds_shape)  # type: ignore[attr-defined]
    assert isinstance(like, DTensor)
    # the public way would move parts that are offloaded to the mesh's device, onto a storage of their own
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    return DTensor(part, DTensorSpec(like.device_mesh, like.placements, meta), requires_grad=False)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, or the tensor itself; every process must call it."""
    if _is_partitioned(tensor):
        return sharded_as(part_of(tensor), tensor).gather()  # type: ignore[attr-defined]
    if isinstance(tensor, FlatShard):
        return tensor.gather()
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    return sharded.to(sharded.device_mesh.device_type).full_tensor()  # offloaded parts lie on the host


@torch.no_grad()
def whole_on_host(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return copies of whole tensors in host memory, gathered one by one; every process must call it.

    Args:
        tensors: Sharded or not.
        keep: Whether this process keeps them; the others help, and get nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if keep:
            found[name] = gathered.detach().to("cpu", copy=not is_sharded(tensor))
    return found


@torch.no_grad()
def fill_from_whole(tensor: Tensor, saved: Tensor) -> None:
    """Write this process's part of a whole tensor into `tensor`, sharded or not."""
    if not is_sharded(tensor):
        tensor.copy_(saved)
        return
    if isinstance(tensor, FlatShard):
        tensor.fill(saved)
        return
    shape = part_of(tensor).shape
    slices = tuple(slice(start, start + size) for start, size in zip(offset_of(tensor), shape, strict=True))
    part_of(tensor).copy_(saved[slices])


def offset_of(tensor: Tensor) -> tuple[int, ...]:
    """Return where in a sharded tensor this process's part begins, in each of its dimensions."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def replica_of(tensor: Tensor) -> tuple[int, int]:
    """Return which of the copies of a sharded tensor this process has a part of, and how many copies there are."""
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return (0, 1) if mesh.ndim == 1 else (mesh.get_local_rank(0), mesh.size(0))


def on_meta(network: nn.Module) -> nn.Module:
    """Return a copy of `network` without its weights' memory."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, empty)


class Twins:
    """Copies of networks without weights, made while those are whole, to be exported in their place.

    Args:
        networks: By role.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._twins = {role: on_meta(network) for role, network in networks.items()}

    def __contains__(self, role: str) -> bool:
        return role in self._twins

    @contextmanager
    def filled(self, role: str, network: nn.Module, *, keep: bool) -> Iterator[nn.Module | None]:
        """Give the role's network in host memory, gathered weight by weight; every process must enter.

        Args:
            role: Its role.
            network: Sharded.
            keep: Whether this process gets it; the others help, and get None.
        """
        weights = whole_on_host(network.state_dict(keep_vars=True), keep=keep)
        if not keep:
            yield None
            return
        twin = self._twins[role]
        twin.load_state_dict(weights, assign=True)
        del weights
        try:
            yield twin
        finally:
            self._twins[role] = on_meta(twin)
