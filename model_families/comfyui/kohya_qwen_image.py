"""Qwen-Image's modules as ComfyUI, musubi-tuner and diffusers know them: by diffusers' paths.

ComfyUI makes one layer of two of Qwen-Image 2.1's feed-forward, and knows their own names after ``transformer.`` alone.
"""

from __future__ import annotations

from ..files.architecture import DIFFUSERS, KohyaFormat
from .original_names import OriginalNames

KOHYA = KohyaFormat("qwen_image", "Qwen-Image", module="networks.lora_qwen_image")
KOHYA_21 = KohyaFormat("qwen_image_2.1", "Qwen-Image-2.1", names=DIFFUSERS)
GATED = {"img_mlp.gate_up": ("img_mlp.gate_layer", "img_mlp.proj")}
ORIGINAL_21 = OriginalNames(blocks={"transformer_blocks": ("transformer_blocks", GATED)})
"""ComfyUI's own layers of 2.1 where their names are others, for LoRAs that were trained on these."""
