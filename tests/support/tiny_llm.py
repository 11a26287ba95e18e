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


def write_llm_tokenizer(folder: Path, *, length: int = 512, special: tuple[str, ...] = (), **further: Any) -> Any:
    """A byte-level tokenizer without merges (a token per letter), as Qwen's, with its template unless told another."""
    from transformers import Qwen2Tokenizer

    letters = [token for token in vocabulary() if not token.endswith("</w>") and not token.startswith("<|")]
    vocab = {token: number for number, token in enumerate((*letters, *SPECIALS, *special))}
    own = {"chat_template": TEMPLATE, "additional_special_tokens": [START, END, *special], **further}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=length, **own)
    tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def begin_prompts(tokenizer: Any, marks: tuple[str, ...]) -> None:
    """Make a tokenizer put special tokens before each prompt, as Gemma's and GLM's, so that none is without tokens."""
    from tokenizers.processors import TemplateProcessing

    numbered = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in marks]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*marks, "$A"]), special_tokens=numbered
    )


def llm(kind: str, width: int, *, seed: int = 0, **further: Any) -> Any:
    """A random language model of a class of transformers: three layers, two heads, embeddings that differ."""
    import torch
    import transformers

    model: Any = getattr(transformers, kind)
    settings = {
        "vocab_size": 300, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width // 2, "max_position_embeddings": 1024,
        "use_cache": False,
    }  # fmt: skip
    encoder = seeded(lambda: model(model.config_class(**{**settings, **further})), seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoder
