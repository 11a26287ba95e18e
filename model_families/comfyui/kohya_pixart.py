"""PixArt's modules as ComfyUI knows them: by diffusers' paths, after ``transformer.``. Its pipelines load no LoRAs."""

from __future__ import annotations

from ..files.architecture import DIFFUSERS, KohyaFormat
from .original_names import SameNames

NAMES = SameNames(
    known=(
        r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
        r"adaln_single\.(linear|emb\.(timestep|resolution|aspect_ratio)_embedder\.linear_[12])",
        r"caption_projection\.linear_[12]|pos_embed\.proj|proj_out",
    )
)
KOHYA = KohyaFormat("pixart_sigma", "pixart-sigma", NAMES.renamed, names=DIFFUSERS, beside_diffusers="ComfyUI")
