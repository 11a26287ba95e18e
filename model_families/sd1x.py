"""Stable Diffusion 1.x: a UNet of 0.9 billion parameters with the text encoder of CLIP ViT-L/14, for 512 pixels."""

from __future__ import annotations

from typing import ClassVar

from ..core.plugin_api.family import ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from .bases.stable_diffusion import StableDiffusion, generation
from .files.architecture import Architecture, KohyaFormat


class SD1x(StableDiffusion):
    """Stable Diffusion 1.x and its fine-tunes, noise- or v-predicting."""

    name: ClassVar[str] = "sd1x"
    native_edge: ClassVar[int] = 512
    architecture: ClassVar[Architecture] = generation(
        "a Stable Diffusion 1.x",
        linear=False,
        text_prefixes=("cond_stage_model.transformer.", "text_encoder."),
        base_repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
        size="about 2 GB in fp16",
        kohya=KohyaFormat("sd_v1", "stable-diffusion-v1", of_v=("sd_v1_v", "stable-diffusion-v1")),
    )

    class Config(StableDiffusion.Config):
        """Settings of the family sd1x, under ``family_config``."""


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [SD1x]
