"""A random tiny Chroma: every part of the real architecture, the network of its modulations included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_parts import CHANNELS, SHORT, Tiny, flow, flow_vae, last, seeded, t5_parts

WIDTH = 32
"""Of T5's states."""


def write_tiny_chroma(folder: Path) -> Path:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    config: dict[str, Any] = {
        "in_channels": 4 * CHANNELS, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2,
    }  # fmt: skip
    tokenizer, text_encoder = t5_parts(folder / "tokenizer", WIDTH)
    ChromaPipeline(
        transformer=seeded(lambda: ChromaTransformer2DModel(**config)),
        vae=flow_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_shift=2.0),
    ).save_pretrained(folder)
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states and mask."""
    states, _, mask, *_ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False, **SHORT)
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


CHROMA: Tiny = flow("chroma", write_tiny_chroma, halves="in turn", encoded=encoded, states=last)
