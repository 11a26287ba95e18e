"""Libraries of prompts in files."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError


def read_library(path: Path | None) -> list[str]:
    """Read prompts from a JSON object or list of texts, or a text file with one per line; none without a path.

    Raises:
        UserError: The file cannot be read, or is JSON of another shape.
    """
    if path is None:
        return []
    remedy = "write a JSON object or list of prompts, or a text file with one prompt per line"
    try:
        text = path.read_text(encoding="utf-8-sig")
        prompts = json_texts(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"validation_prompt_library = {path} cannot be read: {error}", remedy) from error
    return [prompt.strip() for prompt in prompts if prompt.strip()]


def json_texts(text: str) -> list[str]:
    """Return the texts of a JSON list, or the values of a JSON object.

    Raises:
        ValueError: It is no JSON, or JSON of another shape; says where.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno} is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("it nests too many objects and lists") from error
    if not isinstance(content, list | dict):
        raise ValueError(f"it is {shortened(content)}, not a list or an object of texts")
    items = content.items() if isinstance(content, dict) else enumerate(content, 1)
    for name, item in items:
        if not isinstance(item, str):
            raise ValueError(f"entry {name!r} is {shortened(item)}, not a text")
    return list(content.values()) if isinstance(content, dict) else content


def shortened(value: object) -> str:
    """Return a value as messages show it: as JSON, if it can be written so."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
