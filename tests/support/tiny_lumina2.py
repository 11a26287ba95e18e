"""A random tiny Lumina-Image 2.0: every part of the real architecture, axes and refiners included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_llm import START, llm, write_llm_tokenizer
from support.tiny_parts import CHANNELS, Tiny, flow_vae, seeded

WIDTH = 16
"""Of the language model's states; a square, since Gemma multiplies by its root, a buffer that no cast makes exact."""
LENGTH = 245
"""Tokens that are read of a prompt, of which the system prompt takes 177, a token per letter behind one."""


def write_tiny_lumina2(folder: Path, *, shift: float = 6.0, levels: int = 2) -> Path:
    """A random tiny Lumina-Image 2.0, whose tokenizer begins each prompt with a token, as Gemma's, and pads on the left
    unless told otherwise.

    With four levels its autoencoder compresses as the published one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    config: dict[str, Any] = {
        "in_channels": CHANNELS, "hidden_size": 48, "num_layers": 3, "num_refiner_layers": 1, "num_attention_heads": 2,
        "num_kv_heads": 1, "multiple_of": 16, "cap_feat_dim": WIDTH, "axes_dim_rope": (8, 8, 8),
        "axes_lens": (256, 32, 32),
    }  # fmt: skip
    Lumina2Pipeline(
        transformer=seeded(lambda: Lumina2Transformer2DModel(**config)),
        vae=flow_vae(levels),
        text_encoder=llm("Gemma2Model", WIDTH),
        tokenizer=write_llm_tokenizer(folder / "tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    ).save_pretrained(folder)
    write_llm_tokenizer(folder / "tokenizer", padding_side="left", begin=(START,))
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states, those of the padding zero, and their mask; an empty prompt is the unconditional."""
    found = pipeline.encode_prompt(prompts, negative_prompt=prompts, device="cpu", max_sequence_length=LENGTH)
    states, mask = found[:2] if prompts != [""] else found[2:]
    return {"prompt_embeds": states * mask[..., None], "prompt_attention_mask": mask.bool()}


def states(output: Any, cond: dict[str, Any], positions: int) -> Any:
    """The image's states (B, positions, D), which follow those of each prompt, from the output of a block."""
    import torch

    lengths = cond["prompt_attention_mask"].bool().sum(dim=1)
    if output.shape[1] == positions:  # before the streams are joined
        return output
    return torch.stack([one[length : length + positions] for one, length in zip(output, lengths, strict=True)])


SHORT = {"max_sequence_length": LENGTH}
UNNORMED = {"cfg_normalization": False}
LUMINA2 = Tiny(
    "lumina2",
    write_tiny_lumina2,
    settings=SHORT,
    guided={"guidance_scale": 4.0, **SHORT, **UNNORMED},
    unguided={"guidance_scale": 1.0, **SHORT, **UNNORMED},
    written=lambda output: -output,
    halves="in turn",
    encoded=encoded,
    states=states,
)
