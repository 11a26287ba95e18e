"""Qwen-Image's modules as ComfyUI, musubi-tuner and diffusers know them: by diffusers' paths.

ComfyUI makes one layer of two of Qwen-Image 2.1's feed-forward, and knows their own names after ``transformer.`` alone.
"""

from __future__ import annotations

from ._architecture import DIFFUSERS, KohyaFormat

KOHYA = KohyaFormat("qwen_image", "Qwen-Image", module="networks.lora_qwen_image")
KOHYA_21 = KohyaFormat("qwen_image_2.1", "Qwen-Image-2.1", names=DIFFUSERS)
