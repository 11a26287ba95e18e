"""What a forward pass keeps for its backward pass, counted on the meta device: no values, no memory.

The network is called once, with the layers that a LoRA adapts computing its two factors as well, with the types that
autocast gives each kernel, and with attention as the fused kernels keep it (queries, keys, values and the output).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

IN_FP32 = (functional.layer_norm, functional.group_norm)
"""Kernels that autocast runs in fp32 on CUDA, and keeps such inputs of."""
IN_HALF = (functional.linear, functional.conv2d, torch.matmul, torch.bmm, torch.baddbmm)
ADAPTED = (functional.linear, functional.conv2d)


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that one sample's forward pass keeps for its backward pass.

    Attributes:
        whole: All of them.
        recomputed: With gradient checkpointing: what enters the blocks, what lies outside of them, and the block that
            is being computed again.
        block: Those of the largest block, with the gradient of its largest activation.
    """

    whole: int
    recomputed: int
    block: int


def kept_bytes(
    network: Any,
    call: Callable[[Tensor], object],
    sample: Tensor,
    *,
    half: bool,
    wide_norms: bool,
    adapted: Collection[str],
    rank: int,
) -> KeptBytes:
    """Return what `network` keeps of one sample.

    Args:
        network: On the meta device, of diffusers; as it was afterwards.
        call: Calls it with the sample.
        sample: The noisy latents (1, C, h, w), on the meta device.
        half: Whether products are computed in half precision.
        wide_norms: Whether norms are computed in fp32 nevertheless, as on CUDA.
        adapted: Names of the modules that a LoRA adapts; empty: all weights are trained.
        rank: Of the LoRA.
    """
    factors = {network.get_submodule(name).weight: rank for name in adapted}
    counter = _Kept(network, factors)
    kernels = _Kernels(factors, half=half, wide_norms=wide_norms, exclude=counter.exclude)
    hooks = torch.autograd.graph.saved_tensors_hooks(counter.keep, _never)
    with (
        torch.enable_grad(),
        _trained(network, whole=not adapted),
        _checkpointed(network, counter.unit),
        kernels,
        hooks,
    ):
        call(sample.requires_grad_())
    block = max((sum(unit) + max(unit, default=0) for unit in counter.units), default=0)
    inside = sum(map(sum, counter.units))
    recomputed = counter.outside + counter.inputs + block
    return KeptBytes(counter.outside + inside, recomputed, block or counter.largest)


@dataclass
class _Kept:
    """Counts storages once each, by where they are first kept.

    Of blocks that are alike, with inputs that are alike, one is computed.
    """

    network: nn.Module
    adapted: Collection[Tensor]
    outside: int = 0
    inputs: int = 0
    largest: int = 0
    units: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen: dict[int, torch.UntypedStorage] = {}  # held, so that no other comes to lie at its address
        self._unit: list[int] | None = None
        self._known: dict[Hashable, tuple[list[int], Any]] = {}
        for weight in (*self.network.parameters(), *self.network.buffers()):
            self.exclude(weight)

    def exclude(self, tensor: Tensor) -> None:
        self._seen.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())

    def _new_bytes(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return 0
        self._seen[storage._cdata] = storage
        return storage.nbytes()

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor is kept by the graph."""
        num_bytes = self._new_bytes(tensor)
        self.largest = max(self.largest, num_bytes)
        if self._unit is not None:
            self._unit.append(num_bytes)
        else:
            self.outside += num_bytes
        return tensor

    def unit(self, module: Callable[..., Any], *args: Any) -> Any:
        """A block that checkpointing recomputes: what enters it is kept, what it keeps is not."""
        self.inputs += sum(self._new_bytes(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        key = self._kind(module, args)
        if key not in self._known:
            self._unit = []
            self._known[key] = self._unit, module(*args)
            self._unit = None
        kept, output = self._known[key]
        self.units.append(kept)
        return tree_map(_another, output)

    def _kind(self, module: Any, args: Any) -> Hashable:
        """Return what the bytes of a block depend on: its weights, which of them are adapted, and its inputs."""
        weights = [(name, weight.shape, weight in self.adapted) for name, weight in module.named_parameters()]
        inputs = [(each.shape, each.dtype) if isinstance(each, Tensor) else repr(each) for each in tree_leaves(args)]
        return type(module), tuple(weights), tuple(inputs)


def _another(value: Any) -> Any:
    """Return a tensor like this one of another block of the same kind; other values as they are."""
    return torch.empty_like(value, requires_grad=True).clone() if isinstance(value, Tensor) else value


class _Attention(torch.autograd.Function):
    """Attention with the memory of fused kernels, which compute the scores again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


class _Kernels(TorchFunctionMode):
    """Gives each kernel autocast's types, adapted layers their factors, and attention its fused memory."""

    def __init__(
        self, factors: dict[Tensor, int], *, half: bool, wide_norms: bool, exclude: Callable[[Tensor], None]
    ) -> None:
        super().__init__()
        self._factors, self._half, self._wide_norms, self._exclude = factors, half, wide_norms, exclude

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            read = [*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
            return _Attention.apply(*self._cast(read, torch.bfloat16, cast=self._half))
        if func in IN_FP32:
            args = self._cast(args, torch.float32, cast=self._half and self._wide_norms)
        elif func in IN_HALF:
            rank = self._factors.get(args[1]) if func in ADAPTED else None
            args = self._cast(args, torch.bfloat16, cast=self._half)
            if rank is not None:
                return func(*args, **kwargs) + self._product(func, *args, rank=rank)
        return func(*args, **kwargs)

    def _cast(self, args: Any, dtype: torch.dtype, *, cast: bool) -> list[Any]:
        """Return `args` in that type; copies of weights are counted elsewhere."""
        if not cast:
            return list(args)
        found = []
        for value in args:
            if isinstance(value, Tensor) and value.is_floating_point():
                copied = value.to(dtype)
                if isinstance(value, nn.Parameter):
                    self._exclude(copied)
                value = copied
            found.append(value)
        return found

    def _product(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *shape: Any, rank: int) -> Tensor:
        """Return the adapter's product, its factors of the weight's type; `shape` is that of a convolution."""
        down = weight.new_empty(rank, *weight.shape[1:]).requires_grad_()
        up = weight.new_empty(weight.shape[0], rank, *[1] * (weight.dim() - 2)).requires_grad_()
        self._exclude(down)
        self._exclude(up)
        return func(func(x, down, None, *shape), up)


@contextmanager
def _trained(network: nn.Module, *, whole: bool) -> Iterator[None]:
    """Train all weights inside the block, or none."""
    before = [(weight, weight.requires_grad) for weight in network.parameters()]
    for weight, _ in before:
        weight.requires_grad_(whole)
    try:
        yield
    finally:
        for weight, trained in before:
            weight.requires_grad_(trained)


def recomputes_blocks(network: Any) -> bool:
    """Return True if the network can compute its blocks again in the backward pass in place of keeping them."""
    return bool(getattr(network, "_supports_gradient_checkpointing", hasattr(network, "enable_gradient_checkpointing")))


@contextmanager
def _checkpointed(network: Any, unit: Callable[..., Any]) -> Iterator[None]:
    """Call `unit` for each block that the network recomputes, inside the block."""
    if not recomputes_blocks(network):
        yield
        return
    network.enable_gradient_checkpointing(unit)
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()


def _never(tensor: Tensor) -> Tensor:
    raise AssertionError("there is no backward pass")
