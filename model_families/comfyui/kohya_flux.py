"""FLUX.1's modules by the names of the original code, in which projections of one input are one layer."""

from __future__ import annotations

from ..files.architecture import KohyaFormat
from .original_names import OriginalNames

FINAL = "proj_out"
DOUBLE = {
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
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
NAMES = OriginalNames(
    blocks={"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)},
    ends={FINAL: "final_layer.linear"},
)
flux_place = NAMES.place
KOHYA = KohyaFormat("flux1", "flux-1-dev", NAMES.renamed, module="networks.lora_flux", unread=(FINAL,))
