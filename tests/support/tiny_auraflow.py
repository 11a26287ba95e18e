"""A random tiny AuraFlow: blocks of two streams and of one, register tokens, positions cut from a larger grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_parts import SHORT, Tiny, flow, last, seeded, t5_parts
from support.tiny_sdxl import EDGE, SCALE_FACTOR, vae_config

WIDTH = 32
"""Of T5's states."""


def write_tiny_auraflow(folder: Path) -> Path:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    vae = {**vae_config(), "scaling_factor": 0.13025}
    config: dict[str, Any] = {
        "sample_size": EDGE // SCALE_FACTOR, "in_channels": vae["latent_channels"],
        "out_channels": vae["latent_channels"], "num_mmdit_layers": 2, "num_single_dit_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
        "caption_projection_dim": 32, "pos_embed_max_size": 144,
    }  # fmt: skip
    tokenizer, _ = t5_parts(folder / "tokenizer", WIDTH)
    text = {"vocab_size": len(tokenizer), "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    AuraFlowPipeline(
        transformer=seeded(lambda: AuraFlowTransformer2DModel(**config)),
        vae=seeded(lambda: AutoencoderKL(**vae)),
        text_encoder=seeded(lambda: UMT5EncoderModel(UMT5Config(**text, is_encoder_decoder=False, use_cache=False))),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states and, once for each position, its mask."""
    states, mask, *_ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False, **SHORT)
    mask = mask.reshape(states.shape)[..., 0].bool()
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


AURAFLOW: Tiny = flow("auraflow", write_tiny_auraflow, encoded=encoded, states=last)
