"""Prompts behind an instruction that a language model follows, of whose states few are kept ("complex human
instruction", arXiv 2410.10629).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..calls.encoders import token_ids

if TYPE_CHECKING:
    from ...core.plugin_api.batch import Conditioning
    from ..files.source import TextEncoders


@functools.cache
def instruction() -> str:
    """Return what Sana's pipeline writes before a prompt."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


@torch.no_grad()
def instructed(text: TextEncoders, prompts: Sequence[str], *, before: str, count: int) -> Conditioning:
    """Return the first state of each prompt in lower case and the last ones, (B, count, D), and their mask.

    Args:
        text: One tokenizer and its text encoder.
        prompts: The prompts.
        before: What stands before them: the instruction, or nothing.
        count: Number of states that are kept.
    """
    tokenizer, encoder = text.pairs()[0]
    tokenizer.padding_side = "right"
    written = [before + prompt.lower().strip() for prompt in prompts]
    length = count + (len(tokenizer.encode(before)) - 2 if before else 0)
    tokens = token_ids(tokenizer, written, length=length).to(encoder.device)
    states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    kept = [0, *range(1 - count, 0)]
    return {"prompt_embeds": states[:, kept], "prompt_attention_mask": tokens.attention_mask[:, kept]}
