"""Text encoders that are the part of a whole: saved they say what they are, and are loaded by what the whole is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def file_as(filed: Mapping[str, Any], folder: Path) -> bool:
    """Write the config of an encoder that was saved into `folder` as `filed`, the config of its whole, where saving
    wrote the part's; return True if it did.

    diffusers loads T5Gemma's encoder by the config of all of T5Gemma, and its copy with its own config not at all.
    """
    path = folder / "config.json"
    own = json.loads(path.read_text(encoding="utf-8"))
    if filed.get("model_type") in (None, own.get("model_type")):
        return False
    whole = {**filed, "dtype": own.get("dtype")}
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return True
