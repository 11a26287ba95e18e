"""Chroma's modules by the names of the original code: FLUX.1's without modulations of their own.

sd-scripts, ComfyUI and diffusers read the same file.
"""

from __future__ import annotations

from ._architecture import KohyaFormat
from ._kohya_flux import DOUBLE, FINAL, SINGLE
from ._original_names import OriginalNames

MODULATIONS = ("img_mod.lin", "txt_mod.lin", "modulation.lin")
NAMES = OriginalNames(
    blocks={
        "transformer_blocks": ("double_blocks", {key: DOUBLE[key] for key in DOUBLE if key not in MODULATIONS}),
        "single_transformer_blocks": ("single_blocks", {key: SINGLE[key] for key in SINGLE if key not in MODULATIONS}),
    },
    ends={FINAL: "final_layer.linear"},
)
KOHYA = KohyaFormat("chroma", "chroma", NAMES.renamed, module="networks.lora_flux", unread=(FINAL,))
