"""AuraFlow's modules as ComfyUI and diffusers know them: by diffusers' paths, after ``transformer.``."""

from __future__ import annotations

from ..files.architecture import DIFFUSERS, KohyaFormat
from .original_names import SameNames

NAMES = SameNames(
    known=(
        r"joint_transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"joint_transformer_blocks\.\d+\.(ff|ff_context)\.(linear_1|linear_2|out_projection)",
        r"joint_transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
        r"single_transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)",
        r"single_transformer_blocks\.\d+\.(ff\.(linear_1|linear_2|out_projection)|norm1\.linear)",
        r"pos_embed\.proj|context_embedder|time_step_proj\.linear_[12]|norm_out\.linear|proj_out",
    )
)
KOHYA = KohyaFormat("auraflow", "auraflow", NAMES.renamed, names=DIFFUSERS)
