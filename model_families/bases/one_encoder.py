"""The base of transformers that read prompts through one text encoder, up to a number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ...core.plugin_api.family import Capabilities, ExportInfo
from .transformer import TransformerFamily


class OneEncoderFamily(TransformerFamily):
    """A family whose transformer sees the states of one text encoder and where they are padding."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, full=True, second_time=True, features=True, pixels=True, quantised_base=True,
        quantised_text_encoders=1,
    )  # fmt: skip
    embed_keys: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    text_widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "joint_attention_dim"}
    pipeline_tokens: ClassVar[int] = 512
    """``max_sequence_length`` of a plain call."""

    class Config(TransformerFamily.Config):
        """Settings of families with one text encoder."""

        max_sequence_length: int | None = Field(default=None, ge=1)
        """Tokens of a prompt that the text encoder reads, its template included; the rest is cut off. Absent: as many
        as the pipeline reads. Fewer make smaller caches and faster steps.
        """

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the text encoder reads."""
        return self.config.max_sequence_length or self.pipeline_tokens

    @property
    def longest_reader(self) -> tuple[str, int | None]:
        return next(iter(self.architecture.tokenizers)), self.num_tokens

    def long_prompts_remedy(self, num_tokens: int) -> str:
        return f"raise family_config.max_sequence_length (now {self.num_tokens}), or shorten them"

    @property
    def prompt_positions(self) -> int:  # type: ignore[override]
        return self.num_tokens

    def text_settings(self) -> Sequence[str]:
        return (f"max_sequence_length={self.num_tokens}",)

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        call = super().snippet_call(info)
        return call if self.num_tokens == self.pipeline_tokens else {**call, "max_sequence_length": self.num_tokens}
