"""Lumina Image 2.0's modules by the names of the original code, which sd-scripts and ComfyUI have."""

from __future__ import annotations

from ..files.architecture import KohyaFormat
from .original_names import OriginalNames

BLOCK = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}
ENDS = {
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
NAMES = OriginalNames(
    blocks={name: (name, BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
    ends=ENDS,
)
KOHYA = KohyaFormat(
    "lumina2",
    "lumina-2",
    NAMES.renamed,
    module="networks.lora_lumina",
    beside_diffusers="ComfyUI and sd-scripts",
)
