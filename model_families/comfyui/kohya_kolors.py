"""Kolors' UNet has SDXL's modules, and their names.

ComfyUI has no Kolors of its own: the nodes ComfyUI-Kolors-MZ make it from ComfyUI's SDXL, and its rules of names.
"""

from __future__ import annotations

from ..files.architecture import KohyaFormat
from .kohya import original_unet

KOHYA = KohyaFormat("kolors", "kolors", original_unet)
