"""A random tiny SDXL in diffusers layout: every part of the real architecture, 0.4M parameters, no hub."""

from __future__ import annotations

import json
from pathlib import Path

EDGE = 32
"""Pixels along an edge of its images."""
SCALE_FACTOR = 2
"""Pixels per latent along an edge."""
WIDTHS = (32, 48)
"""Widths of the text encoders, different as in the real model; prompt embeddings are as wide as both together."""
TOKENS = 16
"""Length of an encoded prompt."""


def write_tiny_sdxl(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    zero_snr: bool = False,
    force_zeros: bool = True,
    text_std: float = 0.3,
    layers_per_block: int = 2,
) -> Path:
    """Write a random tiny SDXL into `folder` and return it.

    Args:
        folder: Where it goes, in diffusers layout with safetensors.
        seed: Seed of the weights; the global generator is left as it was.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample``, or ``flow`` for a FlowMatchEuler scheduler.
        zero_snr: ``rescale_betas_zero_snr`` of the scheduler.
        force_zeros: ``force_zeros_for_empty_prompt`` of the pipeline.
        text_std: Spread of the token embeddings; large enough for prompts to differ.
        layers_per_block: Layers of each of the UNet's blocks; with 1 a step takes two thirds of the time.
    """
    import torch
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**unet_config(), "layers_per_block": layers_per_block})
        vae = AutoencoderKL(**vae_config())
        text_encoder = CLIPTextModel(text_config(WIDTHS[0], "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(text_config(WIDTHS[1], "gelu"))
        for encoder in (text_encoder, text_encoder_2):
            embeddings = encoder.get_input_embeddings()
            torch.nn.init.normal_(embeddings.weight, std=text_std)
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=write_tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
        tokenizer_2=write_tokenizer(folder / "tokenizer_2", pad="!"),
        scheduler=scheduler(prediction_type, zero_snr),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def unet_config() -> dict[str, object]:
    """Three levels would not fit half a million parameters; two keep one plain and one cross-attention level."""
    return {
        "sample_size": EDGE // SCALE_FACTOR,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 1),
        "use_linear_projection": True,
        "cross_attention_dim": sum(WIDTHS),
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTHS[1],
    }


def vae_config() -> dict[str, object]:
    """A factor of 2, with SDXL's scaling factor."""
    return {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": EDGE,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }


def text_config(width: int, activation: str) -> object:
    """Three layers, so that the penultimate state is none of the ends."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=len(vocabulary()) - 2,
        eos_token_id=len(vocabulary()) - 1,
        pad_token_id=1,
    )


def vocabulary() -> list[str]:
    """Every byte as CLIP's byte-level BPE spells it, alone and at the end of a word, and the two special tokens."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [chr(256 + n) for n in range(256 - len(kept))]
    letters = [*map(chr, kept), *moved]
    return [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]


def write_tokenizer(folder: Path, *, pad: str) -> object:
    """A CLIP tokenizer without merges (a token per letter), made offline."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(vocabulary())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"model_max_length": TOKENS, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **specials}))
    return CLIPTokenizer.from_pretrained(folder)


def scheduler(prediction_type: str, zero_snr: bool) -> object:
    """SDXL's scheduler, or flow matching."""
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    if prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="leading",
        steps_offset=1,
        interpolation_type="linear",
    )
