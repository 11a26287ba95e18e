"""FLUX.1's modules by the names of the original code, in which projections of one input are one layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..core.errors import UserError
from ._architecture import KohyaFormat, Layers
from ._kohya import REMEDY, fused

FINAL = "proj_out"
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_BLOCKS = {"transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE)}
_PATH = re.compile(rf"({'|'.join(_BLOCKS)})\.(\d+)\.(.+)")


def original_flux(layers: Layers, config: Mapping[str, Any]) -> Layers:
    """Return layers by the original code's paths. Raises UserError where a fused one is adapted in part only."""
    found: Layers = {}
    for path in layers:
        if path == FINAL:
            found["final_layer.linear"] = layers[path]
            continue
        name, members = flux_place(path, config)
        if name not in found:
            missing = [member for member in members if member not in layers]
            if missing:
                raise UserError(
                    f"kohya's format holds {', '.join(members)} as one layer, and {missing[0]} is not adapted",
                    f"adapt them together (lora_target_modules), or {REMEDY}",
                )
            found[name] = fused([layers[member] for member in members])
    return found


def flux_place(path: str, config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the original's path, and diffusers' paths of all layers that are fused there. Raises UserError."""
    match = _PATH.fullmatch(path)
    for name, members in _BLOCKS[match[1]][1].items() if match else ():
        if match and match[3] in members:
            stem = f"{match[1]}.{match[2]}"
            return f"{_BLOCKS[match[1]][0]}.{match[2]}.{name}", [f"{stem}.{member}" for member in members]
    raise UserError(f"{path} has no name in kohya's format", REMEDY)


KOHYA = KohyaFormat("flux1", "flux-1-dev", original_flux, module="networks.lora_flux", unread=(FINAL,))
