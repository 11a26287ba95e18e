"""Calls and copies of networks of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.errors import UserError
from ...core.plugin_api.family_parts import FIRST_HALF, Blocks
from ...core.utils.suggest import did_you_mean


class _FarEnough(Exception):
    """Ends a forward pass once the last module that was asked for is computed; no error."""


def outputs_inside(
    modules: Sequence[nn.Module], call: Callable[[], Any], *, pick: Callable[[Any], Tensor], stop: bool
) -> list[Tensor]:
    """Return what `pick` takes of each module's output during `call`.

    Args:
        modules: In the order in which they are computed.
        call: A forward pass of the network that they belong to.
        pick: Finds the activation in a module's output.
        stop: Whether the call ends after the last of them. A call must not be stopped inside modules that the backward
            pass recomputes as a whole.
    """
    found: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)  # picked from later: a recomputed block would have to save what picking saves
        if stop and module is modules[-1]:
            raise _FarEnough

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        call()
    except _FarEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [pick(output) for output in found]


class _FullLengths(TorchFunctionMode):
    """Answers a network that asks for the values of a mask's sum."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.lengths = [mask.shape[1]] * len(mask)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.lengths if func is Tensor.tolist else func(*args, **(kwargs or {}))


def lengths_of(mask: Tensor) -> AbstractContextManager[Any]:
    """Let a network that counts the tokens of prompts run on the meta device, where every prompt has all positions.

    Args:
        mask: 1 where a token is, (B, T).
    """
    return _FullLengths(mask) if mask.is_meta else nullcontext()


def chosen_blocks(names: Sequence[str], blocks: Blocks, *, first_half: Sequence[str]) -> list[str]:
    """Return the names of the blocks asked for, in the network's order.

    Args:
        names: All of them, in the network's order.
        blocks: What was asked for.
        first_half: Those that ``first_half`` means.

    Raises:
        UserError: One is no block of this network, or none is named.
    """
    asked = {FIRST_HALF: first_half, "all": names}.get(blocks, [blocks]) if isinstance(blocks, str) else blocks
    unknown = [name for name in asked if name not in names]
    if unknown or not asked:
        problem = f"{unknown[0]!r} is no block of this network" if unknown else "no block of the network is named"
        hint = did_you_mean(unknown[0], names) if unknown else ""
        raise UserError(problem, f"{hint}its blocks: {', '.join(names)}; or all, or {FIRST_HALF}")
    return [name for name in names if name in asked]


def check_guidance(guidance: Tensor | None, *, taken: bool) -> None:
    """Raise ValueError unless the guidance scale is given where, and only where, the network takes it."""
    if (guidance is not None) == taken:
        return
    raise ValueError(
        "this network takes the guidance scale as an input: pass guidance"
        if taken
        else "this network has no guidance embedding"
    )


def told_scale(guidance: Tensor | None, *, usual: float, like: Tensor) -> Tensor:
    """Return the guidance scale (B,) that a network takes as an input, from the paper's w; `usual` where none is asked
    for.

    Args:
        guidance: Guidance scale minus one, shape (B,).
        usual: The scale, then.
        like: A tensor (B,) on the network's device.
    """
    if guidance is not None:
        return guidance + 1
    return torch.full(like.shape, usual, dtype=torch.float32, device=like.device)


def as_multiplied(value: Tensor, given: torch.dtype) -> Tensor:
    """Return an input in the type `given`, such that 1000 times it is what a pipeline in `value`'s type multiplies.

    Some networks multiply in the type of their latents, which are given in fp32 to networks of half precision.
    """
    return value if value.dtype == given else (value * 1000).to(given) / 1000
