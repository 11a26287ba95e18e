"""Tiny language models as text encoders, and their tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_parts import seeded
from support.tiny_sdxl import vocabulary

START, END = "<|im_start|>", "<|im_end|>"
SPECIALS = ("<|endoftext|>", START, END)
TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message.role }}\n{{ message.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""In the shape of Qwen3's."""


def write_llm_tokenizer(
    folder: Path, *, length: int = 512, special: tuple[str, ...] = (), begin: tuple[str, ...] = (), **further: Any
) -> Any:
    """A byte-level tokenizer without merges (a token per letter), as Qwen's, with its template unless told another.

    `begin` are special tokens before each prompt, as Gemma's and GLM's, so that none is without tokens.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import Qwen2Tokenizer

    letters = [token for token in vocabulary() if not token.endswith("</w>") and not token.startswith("<|")]
    vocab = {token: number for number, token in enumerate((*letters, *SPECIALS, *special))}
    own = {"chat_template": TEMPLATE, "additional_special_tokens": [START, END, *special], **further}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=length, **own)
    if begin:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join([*begin, "$A"]), special_tokens=[(mark, vocab[mark]) for mark in begin]
        )
    tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def llm_settings(width: int) -> dict[str, Any]:
    """Of the config of a language model: three layers, two heads."""
    return {
        "vocab_size": 300, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width // 2, "max_position_embeddings": 1024,
    }  # fmt: skip


def llm(kind: str, width: int, *, seed: int = 0, **further: Any) -> Any:
    """A random language model of a class of transformers, whose embeddings differ."""
    import transformers

    model: Any = getattr(transformers, kind)
    settings = {**llm_settings(width), "use_cache": False, **further}
    return with_wide_embeddings(seeded(lambda: model(model.config_class(**settings)), seed=seed), seed=seed)


def with_wide_embeddings(encoder: Any, *, seed: int = 0) -> Any:
    """The encoder, whose embeddings differ from each other as those of a trained one."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoder
