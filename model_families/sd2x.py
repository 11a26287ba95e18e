"""Stable Diffusion 2.x: the UNet of 1.x with linear projections and the text encoder of OpenCLIP ViT-H/14.

The base models predict noise at 512 x 512 pixels, the others v at 768 x 768; the scheduler config states which.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..core.plugin_api.family import ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from .bases.stable_diffusion import StableDiffusion, generation
from .files.architecture import MINIATURES, Architecture, KohyaFormat


class SD2x(StableDiffusion):
    """Stable Diffusion 2.x and its fine-tunes, noise- or v-predicting."""

    name: ClassVar[str] = "sd2x"
    native_edge: ClassVar[int] = 768
    miniature: ClassVar[Path | None] = MINIATURES / "sd2x_scenes"
    architecture: ClassVar[Architecture] = generation(
        "a Stable Diffusion 2.x",
        linear=True,
        text_prefixes=("cond_stage_model.model.", "text_encoder."),
        base_repository="stabilityai/stable-diffusion-2-1",
        size="about 2.5 GB in fp16",
        kohya=KohyaFormat(
            "sd_v2",
            "stable-diffusion-v2-512",
            of_v=("sd_v2_v", "stable-diffusion-v2-768-v"),
            second_generation=True,
        ),
    )

    class Config(StableDiffusion.Config):
        """Settings of the family sd2x, under ``family_config``."""


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [SD2x]
