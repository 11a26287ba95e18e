"""Attention over a prompt and an image, of which prompts of a batch have different lengths: the padding is not seen."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class MaskedAttention:
    """An attention processor of diffusers that leaves out positions.

    The processors of diffusers for CogView4 add the mask, 0 or 1, to the scores, which leaves out nothing.

    Args:
        inner: Takes the image's states, the prompt's, a mask and a rotary embedding.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return what the processor does; `attention_mask` (B, T + N) is False where nothing may be seen."""
        states = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
        if attention_mask is None:
            return self.inner(attn, **states, image_rotary_emb=image_rotary_emb)
        with _Seen(attention_mask[:, None, None, :]):
            return self.inner(attn, **states, image_rotary_emb=image_rotary_emb)


class _Seen(TorchFunctionMode):
    """Gives attention a mask of keys, (B, 1, 1, S)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = {"attn_mask": self.mask} if func is scaled_dot_product_attention else {}
        return func(*args, **{**(kwargs or {}), **masked})


def with_masks(transformer: Any) -> None:
    """Let the ``attn1`` of every block of a transformer leave out what a mask says, from its next call on."""
    for block in transformer.transformer_blocks:
        if not isinstance(block.attn1.processor, MaskedAttention):
            block.attn1.processor = MaskedAttention(block.attn1.processor)
