"""FLUX.2's modules by the names of the original code, which ComfyUI and musubi-tuner have.

Blocks of two streams have the projections of an attention as one layer; those of one stream are the same in diffusers.
The modulations are shared by all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files.architecture import KohyaFormat
from .original_names import OriginalNames

DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
READ_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "proj_out": "final_layer.linear",
}
UNREAD_ENDS = {
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
"""Those that diffusers' reader of the format leaves out."""


def swapped(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the last modulation, whose scale comes first in diffusers."""
    return ("norm_out.linear",)


NAMES = OriginalNames(
    blocks={"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)},
    ends={**READ_ENDS, **UNREAD_ENDS},
    swapped=swapped,
)
KOHYA = KohyaFormat("flux_2", "Flux.2", NAMES.renamed, module="networks.lora_flux_2", unread=tuple(sorted(UNREAD_ENDS)))
