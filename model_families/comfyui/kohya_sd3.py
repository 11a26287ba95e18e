"""Stable Diffusion 3's modules by the names of the original code, which sd-scripts and ComfyUI have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files.architecture import KohyaFormat
from .original_names import OriginalNames

BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


def swapped(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the last modulations of both streams: without a gate, diffusers has the scale first."""
    return ("norm_out.linear", f"transformer_blocks.{config['num_layers'] - 1}.norm1_context.linear")


NAMES = OriginalNames(blocks={"transformer_blocks": ("joint_blocks", BLOCK)}, ends=ENDS, swapped=swapped)
KOHYA = KohyaFormat(
    "sd3",
    "stable-diffusion-3",
    NAMES.renamed,
    module="networks.lora_sd3",
    beside_diffusers="ComfyUI and sd-scripts",
)
