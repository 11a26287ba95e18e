"""Passes that run as they are written, where the networks of a run are compiled."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

_compiled: Literal["off", "regions", "whole"] = "off"


def note_compiled(mode: Literal["off", "regions", "whole"]) -> None:
    """Say what of the networks of this process is compiled from now on."""
    global _compiled
    _compiled = mode


def eagerly(*, if_whole: bool = False) -> AbstractContextManager[object]:
    """Return a context inside which nothing is compiled or runs compiled: for rare shapes, and for what a compiler
    cannot follow. Without compiled networks it does nothing, and loads no compiler.

    Args:
        if_whole: Only where networks are compiled as a whole, so that hooks on blocks would be inside.
    """
    if _compiled == "off" or (if_whole and _compiled != "whole"):
        return nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")
