"""Chroma's modules by the names of the original code: FLUX.1's, with a network of guidance that makes all modulations.

ComfyUI reads all of them, sd-scripts those of the blocks. diffusers' reader is FLUX.1's, and fails at the guidance's.
"""

from __future__ import annotations

from ..files.architecture import KohyaFormat
from .kohya_flux import DOUBLE, FINAL, SINGLE
from .original_names import OriginalNames

GUIDANCE = "distilled_guidance_layer"
MODULATIONS = ("img_mod.lin", "txt_mod.lin", "modulation.lin")
NAMES = OriginalNames(
    blocks={
        "transformer_blocks": ("double_blocks", {key: DOUBLE[key] for key in DOUBLE if key not in MODULATIONS}),
        "single_transformer_blocks": ("single_blocks", {key: SINGLE[key] for key in SINGLE if key not in MODULATIONS}),
        f"{GUIDANCE}.layers": (f"{GUIDANCE}.layers", {"in_layer": ("linear_1",), "out_layer": ("linear_2",)}),
    },
    ends={
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        f"{GUIDANCE}.in_proj": f"{GUIDANCE}.in_proj",
        f"{GUIDANCE}.out_proj": f"{GUIDANCE}.out_proj",
        FINAL: "final_layer.linear",
    },
)
KOHYA = KohyaFormat(
    "chroma", "chroma", NAMES.renamed, module="networks.lora_flux", beside_diffusers="ComfyUI and sd-scripts"
)
