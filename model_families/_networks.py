"""Calls and copies of networks of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


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
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(pick(output))
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
    return found


def check_guidance(guidance: Tensor | None, *, taken: bool) -> None:
    """Raise ValueError unless the guidance scale is given where, and only where, the network takes it."""
    if (guidance is not None) == taken:
        return
    raise ValueError(
        "this network takes the guidance scale as an input: pass guidance"
        if taken
        else "this network has no guidance embedding"
    )
