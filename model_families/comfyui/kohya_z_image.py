"""Z-Image's modules as ComfyUI, ai-toolkit and diffusers know them: by diffusers' paths, after ``diffusion_model.``."""

from __future__ import annotations

from ..files.architecture import AI_TOOLKIT, KohyaFormat
from .original_names import OriginalNames, SameNames

NAMES = SameNames(
    known=(
        r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_[qkv]|to_out\.0)",
        r"(layers|noise_refiner|context_refiner)\.\d+\.(feed_forward\.w[123]|adaLN_modulation\.0)",
        r"all_x_embedder\.2-1|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)",
        r"cap_embedder\.1|t_embedder\.mlp\.[02]",
    )
)
BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
}
ORIGINAL = OriginalNames(
    blocks={name: (name, BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
    ends={
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    },
)
"""ComfyUI's own layers where their names are others, for LoRAs that were trained on these."""
KOHYA = KohyaFormat("z_image", "Z-Image", NAMES.renamed, names=AI_TOOLKIT)
