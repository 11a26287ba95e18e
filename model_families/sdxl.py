"""Stable Diffusion XL: a UNet with two CLIP text encoders and per-sample micro-conditioning.

The network takes the penultimate states of both encoders, concatenated (B, 77, 2048), the pooled embedding of the
second (B, 1280), and six time ids per sample: original height and width, top and left of the crop, target height and
width, in pixels.

References:
    Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, arXiv 2307.01952.
    Meng et al., On Distillation of Guided Diffusion Models (guidance embedding), arXiv 2210.03142.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..core.errors import UserError
from ..core.plugin_api.family import Capabilities, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from .bases.clip import ClipFamily
from .bases.time_ids import TimeIdsFamily
from .calls.encoders import penultimate
from .comfyui.kohya import original_unet, unet_place
from .files.architecture import (
    AUTOENCODER,
    MINIATURES,
    UNET,
    Architecture,
    FilePart,
    KohyaFormat,
    ReadConfig,
    SingleFile,
)
from .files.checks import check_unet

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders


def check_configs(name: str, config: ReadConfig) -> None:
    """Raise UserError unless the configs are those of an SDXL's UNet and its own autoencoder."""
    unet = config("unet/config.json")
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(
            f"model {name!r} is not an SDXL (unet/config.json: addition_embed_type = "
            f"{unet.get('addition_embed_type')!r}, expected 'text_time')",
            "choose the model_family that fits",
        )
    check_unet(name, unet, config("vae/config.json"))


class SDXL(TimeIdsFamily, ClipFamily):
    """Stable Diffusion XL and its fine-tunes."""

    name: ClassVar[str] = "sdxl"
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True,
        full=True,
        guidance_embedding=True,
        second_time=True,
        features=True,
        pixels=True,
        micro_conditioning=True,
        quantised_base=True,
        quantised_text_encoders=2,
    )
    pixel_multiple: ClassVar[int] = 8
    miniature: ClassVar[Path | None] = MINIATURES / "sdxl_scenes"
    upcasts_vae: ClassVar[bool] = True
    architecture: ClassVar[Architecture] = Architecture(
        title="an SDXL",
        pipeline="StableDiffusionXLPipeline",
        accepted=(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLControlNetPipeline",
        ),
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"},
        encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        check=check_configs,
        made_of="an SDXL base model has two text encoders and two tokenizers, which a refiner lacks",
        lora_encoders=("text_encoder", "text_encoder_2"),
        arguments={"add_watermarker": False},
        single_file=SingleFile(
            parts={
                "unet": UNET,
                "vae": AUTOENCODER,
                "text_encoder": FilePart(
                    "the first text encoder",
                    ("conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.", "text_encoder."),
                ),
                "text_encoder_2": FilePart(
                    "the second text encoder",
                    (
                        *("conditioner.embedders.1.model.", "conditioner.embedders.1.transformer."),
                        *("text_encoders.clip_g.transformer.", "text_encoder_2."),
                    ),
                ),
            },
            base_repository="stabilityai/stable-diffusion-xl-base-1.0",
            size="about 6.5 GB in fp16",
        ),
        kohya=KohyaFormat("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", original_unet),
        original_path=unet_place,
    )

    class Config(ClipFamily.Config):
        """Settings of the SDXL family, under ``family_config``."""

    @cached_property
    def zeros_for_uncond(self) -> bool:
        """``force_zeros_for_empty_prompt`` of the pipeline."""
        return bool(self._source.config("model_index.json").get("force_zeros_for_empty_prompt", True))

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zeros_for_uncond}

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        chunks = self.config.max_prompt_chunks
        states, pooled = zip(*(penultimate(*pair, prompts, chunks=chunks) for pair in text.pairs()), strict=True)
        return {"prompt_embeds": torch.cat(states, dim=-1), "pooled_prompt_embeds": pooled[-1]}

    def uncond(self, cond: Conditioning) -> Conditioning:
        """Return zeros, or the encoded empty prompt where the pipeline forces no zeros; time ids kept."""
        if not self.zeros_for_uncond:
            return super().uncond(cond)
        return {**cond, **{key: torch.zeros_like(cond[key]) for key in self.embed_keys}}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [SDXL]
