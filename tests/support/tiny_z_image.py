"""A random tiny Z-Image: every part of the real architecture, axes and refiners included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_llm import llm, write_llm_tokenizer
from support.tiny_parts import CHANNELS, Tiny, flow_vae, seeded

WIDTH = 32
"""Of the language model's states."""
LENGTH = 96
"""Tokens that are read of a prompt, its template included."""


def write_tiny_z_image(folder: Path, *, shift: float = 6.0) -> Path:
    """A random tiny Z-Image."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": CHANNELS, "dim": 48, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": WIDTH, "axes_dims": [8, 8, 8], "axes_lens": [256, 32, 32],
    }  # fmt: skip
    ZImagePipeline(
        transformer=seeded(lambda: ZImageTransformer2DModel(**config)),
        vae=flow_vae(),
        text_encoder=llm("Qwen3Model", WIDTH),
        tokenizer=write_llm_tokenizer(folder / "tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    ).save_pretrained(folder)
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states, padded, and their mask."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    states, _ = pipeline.encode_prompt(
        list(prompts), device="cpu", do_classifier_free_guidance=False, max_sequence_length=LENGTH
    )
    padded = pad_sequence([*states, states[0].new_zeros(LENGTH, WIDTH)], batch_first=True)[:-1]
    mask = torch.tensor([[position < len(one) for position in range(LENGTH)] for one in states])
    return {"prompt_embeds": padded, "prompt_attention_mask": mask}


def noised(args: Any, kwargs: Any) -> Any:
    """The latents (B, C, h, w) of a call of the network with a list of (C, 1, h, w)."""
    import torch

    return torch.stack(args[0]).squeeze(2)


def velocity(output: Any) -> Any:
    """Noise minus data (B, C, h, w), from what the network returned."""
    import torch

    return -torch.stack(output).squeeze(2)


SHORT = {"max_sequence_length": LENGTH}
Z_IMAGE = Tiny(
    "z-image",
    write_tiny_z_image,
    settings=SHORT,
    guided={"guidance_scale": 3.0, **SHORT},
    unguided={"guidance_scale": 0.0, **SHORT},
    read=noised,
    written=velocity,
    halves="batched, conditional first",
    off_by=1.0,
    encoded=encoded,
)
