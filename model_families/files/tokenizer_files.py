"""What the files of a tokenizer say and its class in transformers does not heed.

The class LlamaTokenizer is named by files of two kinds. In transformers 5 it splits as SentencePiece does, whatever
``tokenizer.json`` says, and loses every space of a tokenizer of bytes, as Mistral's of FLUX.2 dev (issue 45488 of
transformers). ``AutoTokenizer`` of later versions knows it and reads the file as it is, but pads on the right, where
the class pads on the left, as in transformers 4 and in ComfyUI.

Processors keep the template of conversations in a file of their own, which tokenizers do not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMED = ("LlamaTokenizer", "LlamaTokenizerFast")
OF_BYTES = '"ByteLevel"'
"""Stands in a ``tokenizer.json`` whose tokens are of bytes."""


def as_filed(kind: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the class that reads a tokenizer as its files say, and arguments for its ``from_pretrained``.

    Args:
        kind: Class that the architecture names; others than ``AutoTokenizer`` are kept.
        folder: Has the tokenizer's files.
    """
    if kind.__name__ != "AutoTokenizer":
        return kind, {}
    said, template = _read(folder / "tokenizer_config.json"), _read(folder / "chat_template.json")
    arguments = {key: template[key] for key in ("chat_template",) if key in template and key not in said}
    if said.get("tokenizer_class") not in NAMED or not _of_bytes(folder / "tokenizer.json"):
        return kind, arguments
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast, {**arguments, "padding_side": said.get("padding_side", "left")}


def _of_bytes(path: Path) -> bool:
    return path.is_file() and OF_BYTES in path.read_text(encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
