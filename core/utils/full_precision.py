"""Networks, or parts of them, that compute in fp32 although their weights or autocast are of half precision.

A denoiser's first and last layers read and write values whose errors are multiplied: x_0 = (x_t - sigma eps) / alpha,
with sigma / alpha = 14.6 at SDXL's noisiest time. And a difference of two calls is divided by their small distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

HALF = (torch.float16, torch.bfloat16)
_everywhere: ContextVar[bool] = ContextVar("_everywhere", default=False)


def input_type(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type in which latents are given to a network: not rounded where its first layer computes in fp32.

    Args:
        weights: Type of the network's weights.
        device: Device of the network.
    """
    wide = _everywhere.get() or _has_autocast(device)
    return torch.promote_types(weights, torch.float32) if wide else weights


def compute_type(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type that the inner layers of a network compute in: autocast's inside it, fp32 where all is.

    Args:
        weights: Type of the network's weights.
        device: Device of the network.
    """
    if _has_autocast(device):
        return torch.get_autocast_dtype(device.type)
    return torch.promote_types(weights, torch.float32) if _everywhere.get() else weights


def _has_autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # the meta device knows no autocast


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


class _WideWeights:
    """Puts fp32 casts in the place of weights of half precision, and the weights back; gradients reach the weights."""

    def __init__(self) -> None:
        self._held: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []

    def put(self, module: nn.Module) -> None:
        """Cast the module's own weights."""
        half = {
            name: weight for name, weight in module._parameters.items() if weight is not None and weight.dtype in HALF
        }
        if half:
            self._held.append((module, half))
            module._parameters.update({name: weight.float() for name, weight in half.items()})  # type: ignore[misc]

    def restore(self, module: nn.Module | None = None) -> None:
        """Put back the weights of `module`, or all that are cast."""
        kept = [held for held in self._held if module is not None and held[0] is not module]
        for owner, weights in self._held:
            if module is None or owner is module:
                owner._parameters.update(weights)
        self._held = kept


# -- modules ----------------------------------------------------------------------------------------------------------


def compute_in_fp32(network: nn.Module, *, first: str, last: Sequence[str]) -> None:
    """Make the first and the last modules of `network` compute in fp32 from its next call on, with adapters that join
    them later.

    Inside autocast the first's output has autocast's type, as the layers after it expect, and that of the last is fp32.
    Outside, outputs have the type of the inputs; inputs of fp32 and more are treated as ever there.

    Args:
        network: Its modules.
        first: Name of the module that reads the latents.
        last: Names of the modules after the last block, in order.
    """
    network.register_forward_pre_hook(partial(_renew, first=first, last=tuple(last)))


def _renew(network: nn.Module, args: Any, *, first: str, last: Sequence[str]) -> None:
    # at each call, since an adapter puts another module in the place of the one that it adapts
    for name, forward in [(first, _first), *((name, _last) for name in last)]:
        module = network.get_submodule(name)
        if "forward" not in vars(module):
            module.forward = MethodType(forward, module)  # deepcopy binds the copy's to the copy


def _first(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    output, narrow = _forward_in_fp32(module, args, kwargs)
    return output if narrow is None else output.to(narrow)


def _last(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    output, narrow = _forward_in_fp32(module, args, kwargs)
    outside = not torch.is_autocast_enabled(output.device.type)
    return output.to(narrow) if outside and narrow is not None else output


def _forward_in_fp32(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, torch.dtype | None]:
    """Return the output, and the type that it would have as other modules' outputs; None where nothing changes."""
    forward: Callable[..., Any] = type(module).forward
    given = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    device = given.device.type
    autocast = torch.is_autocast_enabled(device)
    if not autocast and given.dtype not in HALF:
        return forward(module, *args, **kwargs), None
    weights = _WideWeights()
    for part in module.modules():
        weights.put(part)
    try:
        with torch.autocast(device, enabled=False):
            output = forward(module, *tree_map(_widened, args), **tree_map(_widened, kwargs))
    finally:
        weights.restore()
    return output, torch.get_autocast_dtype(device) if autocast else given.dtype


# -- whole networks ---------------------------------------------------------------------------------------------------


@contextmanager
def full_precision(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute in fp32 inside the block: without autocast, and with fp32 casts of weights of half precision.

    Each layer's weights are cast when it is called and dropped after it, so that those of one layer are held at a time.
    For calls without a graph: autograd would keep the casts.
    """
    weights, token = _WideWeights(), _everywhere.set(True)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        weights.put(module)
        return tree_map(_widened, args), tree_map(_widened, kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        weights.restore(module)

    with ExitStack() as stack, torch.autocast(device.type, enabled=False):
        for module in network.modules():
            if any(weight is not None and weight.dtype in HALF for weight in module._parameters.values()):
                for handle in (module.register_forward_pre_hook(before, with_kwargs=True),
                               module.register_forward_hook(after)):  # fmt: skip
                    stack.callback(handle.remove)
        try:
            yield
        finally:
            weights.restore()
            _everywhere.reset(token)
