"""Modules by the names of the code that a model was published with, where these differ from diffusers'.

There, projections of one input may be one layer, and the two halves of a modulation may stand the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.errors import UserError
from ..files.architecture import Layer, Layers, none_swapped
from .kohya import REMEDY, fused

Members = tuple[str, ...]
"""diffusers' names of the modules that are one layer in the original, in the order of its rows."""


@dataclass(frozen=True)
class OriginalNames:
    """The table of one architecture.

    Attributes:
        blocks: diffusers' list of blocks -> the original's list, and the original's layer -> its members.
        ends: diffusers' path of a module outside of blocks -> the original's.
        swapped: Returns diffusers' paths of modulations whose two halves are (scale, shift) where the original has
            (shift, scale), given the denoiser's config.
    """

    blocks: Mapping[str, tuple[str, Mapping[str, Members]]]
    ends: Mapping[str, str] = field(default_factory=dict)
    swapped: Callable[[Mapping[str, Any]], Collection[str]] = none_swapped

    def place(self, path: str, config: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
        """Return the original's path, and diffusers' paths of all modules that are one layer there.

        Raises:
            UserError: The original has no such module.
        """
        if path in self.ends:
            return self.ends[path], (path,)
        match = re.fullmatch(r"([\w.]+?)\.(\d+)\.(.+)", path)
        original, table = self.blocks.get(match[1], ("", {})) if match else ("", {})
        for name, members in table.items():
            if match and match[3] in members:
                stem = f"{match[1]}.{match[2]}"
                return f"{original}.{match[2]}.{name}", [f"{stem}.{member}" for member in members]
        raise UserError(f"{path} has no name in kohya's format", REMEDY)

    def renamed(self, layers: Layers, config: Mapping[str, Any]) -> Layers:
        """Return layers by the original's paths. Raises UserError where one is adapted in part only, or has none."""
        found: Layers = {}
        swapped = self.swapped(config)
        for path in layers:
            name, members = self.place(path, config)
            if name in found:
                continue
            missing = [member for member in members if member not in layers]
            if missing:
                raise UserError(
                    f"kohya's format holds {', '.join(members)} as one layer, and {missing[0]} is not adapted",
                    f"adapt them together (lora_target_modules), or {REMEDY}",
                )
            layer = fused([layers[member] for member in members])
            found[name] = halves_swapped(layer) if path in swapped else layer
        return found


@dataclass(frozen=True)
class SameNames:
    """An architecture whose modules a client knows by diffusers' paths.

    Attributes:
        known: Expressions that match the paths that it knows.
    """

    known: tuple[str, ...]

    def renamed(self, layers: Layers, config: Mapping[str, Any]) -> Layers:
        """Return the layers as they are. Raises UserError for a path that the client does not know."""
        pattern = re.compile("|".join(self.known))
        for path in layers:
            if not pattern.fullmatch(path):
                raise UserError(f"ComfyUI has no name for {path}", REMEDY)
        return layers


def halves_swapped(layer: Layer) -> Layer:
    """Return a layer whose outputs' second half comes first."""
    return Layer(layer.down, torch.cat(layer.up.chunk(2)[::-1]), layer.alpha)
