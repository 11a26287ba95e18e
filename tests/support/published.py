"""Published sizes of the networks whose LoRAs ComfyUI reads, and of tiny ones of the same making."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.model_families.comfyui import (
    kohya_auraflow,
    kohya_chroma,
    kohya_flux,
    kohya_flux2,
    kohya_lumina2,
    kohya_pixart,
    kohya_qwen_image,
    kohya_sd3,
    kohya_z_image,
)
from distill.model_families.files.architecture import KohyaFormat
from support import comfyui_keys as keys
from support import comfyui_more_keys as more


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        kohya: Our form of its LoRAs.
        client: ComfyUI's names.
        network: Class of the denoiser in diffusers.
        config: What of its published config differs from the class' defaults.
        sizes: The same for ComfyUI's tables.
        source: Where the config stands.
        layers: How many of its linear layers and convolutions our form has a place for.
        own: How many of all of them ComfyUI finds in a student's own file, in diffusers' names.
        unheld: Expression for the modules that our form has no place for.
    """

    kohya: KohyaFormat
    client: keys.Client
    network: str
    config: Mapping[str, Any]
    sizes: Mapping[str, Any]
    source: str
    layers: int
    own: int
    unheld: str = "(?!)"


def linear_layers(network: Any) -> dict[str, Any]:
    """The modules of a network that a LoRA can adapt, by their paths."""
    from torch import nn

    found = network.named_modules()
    return {path: module for path, module in found if isinstance(module, nn.Linear | nn.Conv2d)}


def sd3(depth: int, **config: Any) -> dict[str, Any]:
    """Config of a Stable Diffusion 3 of `depth` blocks, whose width is 64 times that."""
    return {"num_layers": depth, "num_attention_heads": depth, "attention_head_dim": 64, "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * depth, "pooled_projection_dim": 2048, "pos_embed_max_size": 16,
            "sample_size": 16, "in_channels": 16, **config}  # fmt: skip


def sd3_sizes(depth: int, **sizes: Any) -> dict[str, Any]:
    return {"d": 64 * depth, "latent": 64, "text": 4096, "pooled": 2048, "depth": depth, **sizes}


FLUX2 = {"attention_head_dim": 128, "in_channels": 128}
EMBEDDERS = r"x_embedder|context_embedder|time_text_embed\..+|norm_out\.linear"
SD3_SOURCE = "stabilityai/stable-diffusion-3%s: transformer/config.json (its table of positions has no LoRA)"
PUBLISHED = {
    "sd3-medium": Published(
        kohya_sd3.KOHYA, keys.SD3, "SD3Transformer2DModel", sd3(24), sd3_sizes(24), SD3_SOURCE % "-medium", 341, 341
    ),
    "sd3.5-medium": Published(
        kohya_sd3.KOHYA, keys.SD3, "SD3Transformer2DModel",
        sd3(24, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"), sd3_sizes(24, dual=range(13)),
        SD3_SOURCE % ".5-medium", 393, 393,
    ),
    "sd3.5-large": Published(
        kohya_sd3.KOHYA, keys.SD3, "SD3Transformer2DModel", sd3(38, qk_norm="rms_norm"), sd3_sizes(38),
        SD3_SOURCE % ".5-large", 537, 537,
    ),
    "flux.1-dev": Published(
        kohya_flux.KOHYA, keys.FLUX, "FluxTransformer2DModel", {"guidance_embeds": True},
        {"d": 3072, "latent": 64, "text": 4096, "pooled": 768, "depth": 19, "singles": 38, "approximator": 0},
        "black-forest-labs/FLUX.1-dev: transformer/config.json", 495, 504, EMBEDDERS,
    ),
    "chroma1-hd": Published(
        kohya_chroma.KOHYA, keys.CHROMA, "ChromaTransformer2DModel", {},
        {"d": 3072, "latent": 64, "text": 4096, "guide": 5120, "depth": 19, "singles": 38, "approximator": 5},
        "lodestones/Chroma1-HD: transformer/config.json", 433, 421,
    ),
    "flux.2-dev": Published(
        kohya_flux2.KOHYA, keys.FLUX2, "Flux2Transformer2DModel", {},
        {"d": 6144, "latent": 128, "text": 15360, "depth": 8, "singles": 48},
        "black-forest-labs/FLUX.2-dev: transformer/config.json", 203, 196,
    ),
    "flux.2-klein-4b": Published(
        kohya_flux2.KOHYA, keys.FLUX2, "Flux2Transformer2DModel",
        {**FLUX2, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
         "guidance_embeds": False},
        {"d": 3072, "latent": 128, "text": 7680, "depth": 5, "singles": 20},
        "black-forest-labs/FLUX.2-klein-4B: transformer/config.json", 109, 104,
    ),
    "flux.2-klein-9b": Published(
        kohya_flux2.KOHYA, keys.FLUX2, "Flux2Transformer2DModel",
        {**FLUX2, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
         "guidance_embeds": False},
        {"d": 4096, "latent": 128, "text": 12288, "depth": 8, "singles": 24},
        "black-forest-labs/FLUX.2-klein-9B: transformer/config.json", 153, 148,
    ),
    "lumina-image-2.0": Published(
        kohya_lumina2.KOHYA, keys.LUMINA2, "Lumina2Transformer2DModel",
        {"hidden_size": 2304, "num_layers": 26, "num_refiner_layers": 2, "num_attention_heads": 24, "num_kv_heads": 8,
         "cap_feat_dim": 2304, "in_channels": 16, "multiple_of": 256, "axes_dim_rope": (32, 32, 32)},
        {"d": 2304, "k": 768, "latent": 64, "text": 2304, "time": 1024, "step": 1024, "f": 9216, "depth": 26,
         "refiners": 2},
        "Alpha-VLLM/Lumina-Image-2.0: transformer/config.json", 244, 0,
    ),
    "z-image": Published(
        kohya_z_image.KOHYA, keys.Z_IMAGE, "ZImageTransformer2DModel",
        {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560,
         "in_channels": 16},
        {"d": 3840, "k": 3840, "latent": 64, "text": 2560, "time": 1024, "step": 256, "f": 10240, "depth": 30,
         "refiners": 2},
        "Tongyi-MAI/Z-Image and Z-Image-Turbo: transformer/config.json", 276, 276,
    ),
    "auraflow-0.3": Published(
        kohya_auraflow.KOHYA, more.AURAFLOW, "AuraFlowTransformer2DModel",
        {"attention_head_dim": 256, "num_attention_heads": 12, "num_mmdit_layers": 4, "num_single_dit_layers": 32,
         "joint_attention_dim": 2048, "caption_projection_dim": 3072, "in_channels": 4, "pos_embed_max_size": 64,
         "sample_size": 64},
        {"d": 3072, "f": 8192, "latent": 16, "text": 2048, "depth": 4, "singles": 32},
        "fal/AuraFlow-v0.3: transformer/config.json (its table of positions has no LoRA)", 326, 326,
    ),
    "pixart-sigma-1024": Published(
        kohya_pixart.KOHYA, more.PIXART, "PixArtTransformer2DModel",
        {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152,
         "caption_channels": 4096, "in_channels": 4, "out_channels": 8, "sample_size": 128,
         "use_additional_conditions": False},
        {"d": 1152, "latent": 16, "text": 4096, "depth": 28},
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS: transformer/config.json", 287, 287,
    ),
    "qwen-image": Published(
        kohya_qwen_image.KOHYA, more.QWEN_IMAGE, "QwenImageTransformer2DModel",
        {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584,
         "in_channels": 64, "out_channels": 16},
        {"d": 3072, "latent": 64, "text": 3584, "depth": 60},
        "Qwen/Qwen-Image: transformer/config.json", 846, 846,
    ),
    "qwen-image-2.1": Published(
        kohya_qwen_image.KOHYA_21, more.QWEN_IMAGE_21, "QwenImage21Transformer2DModel",
        {"num_layers": 32, "num_attention_heads": 32, "attention_head_dim": 128, "context_in_dim": 4096,
         "in_channels": 64, "out_channels": 64},
        {"d": 4096, "latent": 64, "text": 4096, "depth": 32},
        "Qwen/Qwen-Image-2.1: transformer/config.json", 232, 232,
    ),
}  # fmt: skip
