"""Random tiny Sanas: every part of the real architecture, of both generations."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from support.tiny_llm import llm
from support.tiny_parts import CHANNELS, Tiny, seeded

WIDTH = 64
"""Of the language model's states; a square, since Gemma multiplies by its root, a buffer that no cast makes exact."""
LENGTH = 64
"""Tokens that are kept of a prompt."""
SCALE = 0.41407


def write_tokenizer(folder: Path) -> Any:
    """Gemma's tokenizer without merges: a token per letter."""
    from diffusers import SanaPipeline
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    letters = ["\u2581", "\n", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    vocab = {token: number for number, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters))}
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default[:-1]
    # the instruction's lines are a token each, which spares time
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[], model_max_length=8192, additional_special_tokens=lines)
    begun = {"single": "<bos> $A", "pair": "<bos> $A $B", "special_tokens": [("<bos>", vocab["<bos>"])]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**begun)
    tokenizer.save_pretrained(folder)
    return GemmaTokenizer.from_pretrained(folder)


def write_tiny_sana(folder: Path, *, newer: bool = False) -> Path:
    """A random tiny Sana with the published DPM-Solver, or one of the second generation (`newer`: normed queries),
    with positions as those for 2,048 pixels.
    """
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    vae: dict[str, Any] = {
        "latent_channels": CHANNELS, "attention_head_dim": 8, "scaling_factor": SCALE,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 16),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
    }  # fmt: skip
    transformer: dict[str, Any] = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3, "num_attention_heads": 4,
        "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
        "cross_attention_dim": 32, "caption_channels": WIDTH, "sample_size": 8,
    }  # fmt: skip
    transformer |= {"qk_norm": "rms_norm_across_heads", "interpolation_scale": 1.0} if newer else {}
    dpm = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    SanaPipeline(
        transformer=seeded(lambda: SanaTransformer2DModel(**transformer)),
        vae=seeded(lambda: AutoencoderDC(**vae)),
        text_encoder=llm("Gemma2Model", WIDTH, query_pre_attn_scalar=16, max_position_embeddings=8192),
        tokenizer=write_tokenizer(folder / "tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0) if newer else DPMSolverMultistepScheduler(**dpm),
    ).save_pretrained(folder)
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states of prompts with its instruction, or those of the negative prompt where it is empty."""
    told = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    found = pipeline.encode_prompt(
        prompts, negative_prompt="", device="cpu", max_sequence_length=LENGTH, complex_human_instruction=told
    )
    states, mask = found[2:] if prompts == [""] else found[:2]
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def deep_latents(vae: Any, pixels: Any) -> tuple[Any, Any, Any]:
    """See :func:`.tiny_parts.plain_latents`; there is no distribution."""
    latents = vae.encode(pixels).latent
    return latents * SCALE, latents * SCALE, vae.decode(latents).sample


CALL = {"max_sequence_length": LENGTH, "use_resolution_binning": False}
SANA = Tiny(
    "sana",
    write_tiny_sana,
    settings={"max_sequence_length": LENGTH},
    guided={"guidance_scale": 4.0, **CALL},
    unguided={"guidance_scale": 1.0, **CALL},
    kinks=True,
    encoded=encoded,
    autoencoded=deep_latents,
)
SANA_1_5 = Tiny(
    "sana",
    lambda folder: write_tiny_sana(folder, newer=True),
    settings=SANA.settings,
    guided=SANA.guided,
    unguided=SANA.unguided,
    kinks=True,
    encoded=encoded,
    autoencoded=deep_latents,
)
