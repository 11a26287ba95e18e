"""Random tiny models of every family in diffusers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import tiny_sdxl
from support.tiny_auraflow import AURAFLOW
from support.tiny_chroma import CHROMA
from support.tiny_cogview4 import COGVIEW4
from support.tiny_flux2 import DEV, KLEIN
from support.tiny_kolors import KOLORS
from support.tiny_lumina2 import LUMINA2
from support.tiny_parts import CHANNELS, T5_WIDTH, Tiny, clip_encoder, flow, flow_vae, seeded, t5_parts
from support.tiny_pixart import PIXART
from support.tiny_qwen import QWEN_IMAGE, QWEN_IMAGE_2
from support.tiny_sana import SANA, SANA_1_5
from support.tiny_sdxl import EDGE, SCALE_FACTOR, WIDTHS, write_tokenizer
from support.tiny_z_image import Z_IMAGE


def write_tiny_sd(folder: Path, *, linear: bool, prediction_type: str = "epsilon", zero_snr: bool = False) -> Path:
    """A random tiny Stable Diffusion of the first generation, or of the second (`linear` projections)."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    config = tiny_sdxl.unet_config()
    for key in ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        del config[key]
    config |= {"cross_attention_dim": WIDTHS[0], "use_linear_projection": linear}
    StableDiffusionPipeline(
        unet=seeded(lambda: UNet2DConditionModel(**config)),
        vae=seeded(lambda: AutoencoderKL(**{**tiny_sdxl.vae_config(), "scaling_factor": 0.18215})),
        text_encoder=clip_encoder("CLIPTextModel", WIDTHS[0], "gelu" if linear else "quick_gelu"),
        tokenizer=write_tokenizer(folder / "tokenizer", pad="!" if linear else "<|endoftext|>"),
        scheduler=tiny_sdxl.scheduler(prediction_type, zero_snr),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_tiny_sd3(folder: Path, *, t5: bool = True, newer: bool = False) -> Path:
    """A random tiny Stable Diffusion 3, or 3.5 (`newer`: normed queries, dual attention), with or without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    config: dict[str, Any] = {
        "sample_size": EDGE // SCALE_FACTOR,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": T5_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": sum(WIDTHS),
        "pos_embed_max_size": EDGE // SCALE_FACTOR,
    }
    config |= {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)} if newer else {}
    tokenizer_3, text_encoder_3 = t5_parts(folder / "tokenizer_3", T5_WIDTH) if t5 else (None, None)
    StableDiffusion3Pipeline(
        transformer=seeded(lambda: SD3Transformer2DModel(**config)),
        vae=flow_vae(),
        text_encoder=clip_encoder("CLIPTextModelWithProjection", WIDTHS[0], "quick_gelu"),
        text_encoder_2=clip_encoder("CLIPTextModelWithProjection", WIDTHS[1], "gelu"),
        text_encoder_3=text_encoder_3,
        tokenizer=write_tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
        tokenizer_2=write_tokenizer(folder / "tokenizer_2", pad="!"),
        tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def write_tiny_flux(folder: Path, *, guidance: bool) -> Path:
    """A random tiny FLUX.1: dev, with `guidance` as an input and a shift by the resolution, or schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": WIDTHS[0],
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": guidance,
    }
    tokenizer_2, text_encoder_2 = t5_parts(folder / "tokenizer_2", T5_WIDTH)
    dev: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 16, "max_shift": 2.0}
    FluxPipeline(
        transformer=seeded(lambda: FluxTransformer2DModel(**config)),
        vae=flow_vae(),
        text_encoder=clip_encoder("CLIPTextModel", WIDTHS[0], "quick_gelu"),
        text_encoder_2=text_encoder_2,
        tokenizer=write_tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(**(dev if guidance else {"shift": 1.0})),
    ).save_pretrained(folder)
    return folder


MODELS = {
    "sd1x": Tiny("sd1x", lambda folder: write_tiny_sd(folder, linear=False)),
    "sd1x-v-zero-snr": Tiny(
        "sd1x", lambda folder: write_tiny_sd(folder, linear=False, prediction_type="v_prediction", zero_snr=True)
    ),
    "sd2x-v": Tiny("sd2x", lambda folder: write_tiny_sd(folder, linear=True, prediction_type="v_prediction")),
    "sd3": flow("sd3", write_tiny_sd3),
    "sd3.5-without-t5": flow("sd3", lambda folder: write_tiny_sd3(folder, t5=False, newer=True)),
    "flux-dev": flow(
        "flux",
        lambda folder: write_tiny_flux(folder, guidance=True),
        unguided={"guidance_scale": 3.5},
        embedded=True,
    ),
    "flux-schnell": flow(
        "flux",
        lambda folder: write_tiny_flux(folder, guidance=False),
        scale_key="true_cfg_scale",
        guided={"true_cfg_scale": 4.0, "negative_prompt": ["", ""]},
        unguided={"true_cfg_scale": 1.0},
        halves="in turn",
    ),
}
"""Name of a variant -> model, of the families that most tests look at."""
NEWER = {
    "z-image": Z_IMAGE,
    "qwen-image": QWEN_IMAGE,
    "qwen-image-2": QWEN_IMAGE_2,
    "sana": SANA,
    "sana-1.5": SANA_1_5,
    "flux2-klein": KLEIN,
    "flux2-dev": DEV,
    "chroma": CHROMA,
    "auraflow": AURAFLOW,
    "lumina2": LUMINA2,
    "pixart-sigma": PIXART,
    "kolors": KOLORS,
    "cogview4": COGVIEW4,
}
"""The same for families whose tests are those of every family alone."""
