"""Families whose prompts are read by CLIP alone: 75 tokens at a time, in as many chunks as the user allows.

A prompt is cut into chunks of 75 tokens; each goes through the text encoder with marks of beginning and end of its own,
and the states of all are laid one after the other: (B, 77 n, D). The pooled embedding is that of the first chunk. This
is what AUTOMATIC1111 and ComfyUI do; sd-scripts leaves out the marks between chunks (75 n + 2), and the community
pipeline of diffusers for SDXL pools the last chunk. All prompts get the same number of chunks, empty ones after short
prompts, as in sd-scripts.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from .unet import UNetFamily

CLIP_POSITIONS = 77
"""75 tokens with the marks of beginning and end."""


class ClipFamily(UNetFamily):
    """A UNet that is conditioned on the states of CLIP text encoders."""

    class Config(UNetFamily.Config):
        """Settings of families with CLIP text encoders alone."""

        max_prompt_chunks: int = Field(default=1, ge=1, le=16)
        """Chunks of 75 tokens in which captions and prompts are read; what is longer is cut off. Each makes the text
        cache larger and the attention to the prompt slower. Plain pipelines read one chunk, which goes on to work."""

    @property
    def longest_reader(self) -> tuple[str, int | None]:
        return "tokenizer", None

    @property
    def max_prompt_tokens(self) -> int | None:
        one = super().max_prompt_tokens
        return one and one * self.config.max_prompt_chunks

    @property
    def prompt_positions(self) -> int:
        return CLIP_POSITIONS * self.config.max_prompt_chunks

    def long_prompts_remedy(self, num_tokens: int) -> str:
        needed = -(-num_tokens // ((self.max_prompt_tokens or num_tokens) // self.config.max_prompt_chunks))
        return f"set family_config.max_prompt_chunks to {min(needed, 16)} to have them read whole, or shorten them"

    def text_settings(self) -> Sequence[str]:
        chunks = self.config.max_prompt_chunks
        return (f"max_prompt_chunks={chunks}",) if chunks > 1 else ()
