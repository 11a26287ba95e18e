"""A random tiny CogView4: prompts of a multiple of 16 tokens, sizes, a shift that is linear by the resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_llm import SPECIALS, llm, write_llm_tokenizer
from support.tiny_parts import CHANNELS, SIZES, Tiny, flow_vae, seeded

WIDTH = 32
"""Of the language model's states."""
LENGTH = 60
"""Tokens that are read of a prompt, no multiple of 16."""


def write_glm4_tokenizer(folder: Path) -> Any:
    """A token per letter behind two marks; it pads on the left."""
    from transformers import PreTrainedTokenizerFast

    letters = write_llm_tokenizer(folder, begin=SPECIALS[1:])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters.backend_tokenizer, pad_token=SPECIALS[0], padding_side="left", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_tiny_cogview4(folder: Path) -> Path:
    """A random tiny CogView4."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

    config: dict[str, Any] = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "text_embed_dim": WIDTH, "time_embed_dim": 24, "condition_dim": 8,
        "sample_size": 16, "rope_axes_dim": (16, 16),
    }  # fmt: skip
    CogView4Pipeline(
        transformer=seeded(lambda: CogView4Transformer2DModel(**config)),
        vae=flow_vae(shift_factor=None),
        text_encoder=llm("GlmModel", WIDTH, pad_token_id=0),
        tokenizer=write_glm4_tokenizer(folder / "tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=16,
            time_shift_type="linear",
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states of each prompt alone, and where they are."""
    import torch

    found = [
        pipeline.encode_prompt([one], None, False, device="cpu", max_sequence_length=LENGTH)[0][0] for one in prompts
    ]
    states = found[0].new_zeros(len(prompts), -(-LENGTH // 16) * 16, WIDTH)
    mask = torch.zeros(states.shape[:2], dtype=torch.bool)
    for row, own in enumerate(found):
        states[row, : len(own)], mask[row, : len(own)] = own, True
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


SHORT = {"max_sequence_length": LENGTH}
COGVIEW4 = Tiny(
    "cogview4",
    write_tiny_cogview4,
    settings=SHORT,
    guided={"guidance_scale": 5.0, **SHORT},
    unguided={"guidance_scale": 1.0, **SHORT},
    halves="in turn",
    encoded=encoded,
    alone=True,
    times=lambda pipeline: 1000 * pipeline.scheduler.sigmas[:-1],
    sized=SIZES,
    states=lambda output, cond, positions: output[0],
)
