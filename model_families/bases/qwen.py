"""The base of the families of Qwen-Image: prompts in a conversation that a vision-language model reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...core.plugin_api.family import ExportInfo
from .one_encoder import OneEncoderFamily

if TYPE_CHECKING:
    from ...core.plugin_api.batch import Conditioning
    from ..files.source import TextEncoders

CONVERSATION = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"
"""What the pipelines write around a prompt, and around the negative one; the system's words are the generation's."""


class QwenFamily(OneEncoderFamily):
    """A family whose prompts stand in a conversation, of which the network sees what follows the system's words.

    The text encoder is loaded whole, as files and pipelines have it; its vision tower and its head compute nothing.
    """

    embed_keys: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_embeds_mask")
    template: ClassVar[str]
    """The conversation, with ``{}`` where the prompt goes."""

    @abstractmethod
    def dropped(self, tokenizer: Any) -> int:
        """Return the number of tokens before the user's turn, whose states the network is not given."""

    @abstractmethod
    def states(self, encoder: Any, tokens: Any) -> Tensor:
        """Return the text encoder's states (B, T, D) that the network is given."""

    @property
    def max_prompt_tokens(self) -> int | None:
        tokenizer = self._tokenizer
        around = len(tokenizer(self.template.format("")).input_ids) - self.dropped(tokenizer)
        return self.num_tokens - around

    def written(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return [self.template.format(prompt) for prompt in prompts]

    @torch.no_grad()
    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = text.pairs()[0]
        dropped = self.dropped(tokenizer)
        # padded to the longest here, which is much less than what is cached: states of a causal model stay the same
        tokens = self.tokens(tokenizer, self.written(tokenizer, prompts), length=self.num_tokens + dropped)
        tokens = tokens.to(encoder.device)
        states, mask = self.states(encoder, tokens), tokens.attention_mask.bool()
        rows = [one[kept][dropped:] for one, kept in zip(states, mask, strict=True)]
        full = states.new_zeros(self.num_tokens, states.shape[-1])
        lengths = torch.tensor([[len(row)] for row in rows], device=states.device)
        return {
            "prompt_embeds": pad_sequence([*rows, full], batch_first=True)[:-1],
            "prompt_embeds_mask": torch.arange(self.num_tokens, device=states.device) < lengths,
        }

    def tokens(self, tokenizer: Any, texts: Sequence[str], *, length: int) -> Any:
        """Return the tokens of texts, cut to `length` and padded to the longest, with their attention mask."""
        return tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale}

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        scale = info.sampler.guidance_scale
        call = {key: value for key, value in super().snippet_call(info).items() if key != "guidance_scale"}
        return {**call, "true_cfg_scale": max(scale, 1.0), **({"negative_prompt": ""} if scale > 1 else {})}


class WithoutPrompts:
    """Stands in for the processor of a pipeline that is given encoded prompts: its constructor counts tokens by it."""

    tokenizer = type("NoTokens", (), {"encode": staticmethod(lambda text: [0])})

    def apply_chat_template(self, conversation: Any, **arguments: Any) -> list[list[int]]:
        """Return no tokens."""
        return [[]]
