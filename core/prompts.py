"""Libraries of prompts in files."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import UserError


def read_library(path: Path | None) -> list[str]:
    """Prompts of a JSON object or list of texts, or of a text file with one per line; none without a path.

    Raises:
        UserError: The file cannot be read, or is JSON of another shape.
    """
    if path is None:
        return []
    remedy = "write a JSON object or list of prompts, or a text file with one prompt per line"
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"validation_prompt_library = {path} cannot be read: {error}", remedy) from error
    prompts = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"validation_prompt_library = {path} holds something else than texts", remedy)
    return [prompt.strip() for prompt in prompts if prompt.strip()]
