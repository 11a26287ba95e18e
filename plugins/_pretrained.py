"""Pretrained networks of transformers for evaluators: loading, availability, and their name in scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from ..core.settings.types import HubOrPath

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PACKAGES: Mapping[str, str] = {"transformers": "transformers>=4.50,<6"}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SECONDS = 10.0
"""Seconds that the hub may take to answer whether it has a model."""


class PretrainedConfig(BaseModel):
    """Which network to use, and how to run it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: HubOrPath | None = None
    """Hub id or local folder of a model of transformers, with safetensors."""
    processor: HubOrPath | None = None
    """Hub id or folder of its processor, if it lies elsewhere; absent: the model's own."""
    revision: str | None = None
    """Revision of the hub model (branch, tag or commit)."""
    label: str | None = Field(default=None, pattern=r"^[a-z0-9_]+$")
    """Name of the network in the names of scores; absent: the last part of the id or path."""
    batch_size: int = Field(default=32, ge=1)
    """Images in one pass of the network."""


def label_of(config: Any) -> str:
    """Return the network's name in scores: letters, digits and underscores."""
    if config.label:
        return config.label
    return re.sub(r"[^a-z0-9]+", "_", config.model.rstrip("/").rpartition("/")[2].lower()).strip("_")


def problem(evaluator: str, config: Any) -> str | None:
    """Return why the network is not available here, and the remedy; None where it is."""
    key = f"evaluator_config.{evaluator}.model"
    if config.model is None:
        return f"it names no network (set {key} to a hub id or a folder)"
    for name in dict.fromkeys([config.model, config.processor or config.model]):
        found = _place_problem(name, config.revision, weights=name == config.model)
        if found:
            return f"{key} = {config.model!r}: {found}"
    return None


def _place_problem(name: str, revision: str | None, *, weights: bool) -> str | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if weights and not any((folder / file).is_file() for file in WEIGHTS):
            return f"the folder has no {WEIGHTS[0]} (save_pretrained of transformers writes it)"
        return None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{name} is not there (a folder as save_pretrained writes it, or a hub id)"
    return _hub_problem(name, revision, weights=weights)


def _hub_problem(name: str, revision: str | None, *, weights: bool) -> str | None:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    wanted = WEIGHTS if weights else ("preprocessor_config.json", "processor_config.json")
    if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in wanted):
        return None
    mend = f"download it once (hf download {name}), or name a local folder"
    if constants.HF_HUB_OFFLINE:
        return f"{name} is not in the cache of this machine, and HF_HUB_OFFLINE is set ({mend})"
    try:
        files = {file.rfilename for file in HfApi().model_info(name, revision=revision, timeout=SECONDS).siblings or ()}
    except Exception as error:  # whatever its client raises, the model cannot be had; the reason is passed on
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{name} is not in the cache, and the hub does not give it: {type(error).__name__}: {first} ({mend})"
    if not files & set(wanted):
        return f"{name} on the hub has no {wanted[0]} (only safetensors are read)"
    return None


def load(config: Any, device: str, *, images_only: bool = False) -> tuple[Any, Any]:
    """Load (model in eval mode without gradients on `device`, its processor, or that of images alone)."""
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor

    revision = {} if config.revision is None else {"revision": config.revision}
    model: Any = AutoModel.from_pretrained(config.model, use_safetensors=True, **revision)
    kind: Any = AutoImageProcessor if images_only else AutoProcessor
    own = {} if config.processor else revision  # the revision is the model's
    processor = kind.from_pretrained(config.processor or config.model, **own)
    return model.requires_grad_(False).eval().to(device), processor


def pixels(processor: Any, images: list[Image], device: str) -> Tensor:
    """Return images as the network's input, shape (B, 3, h, w)."""
    own = getattr(processor, "image_processor", processor)  # a processor of images alone is its own
    return own(images=images, return_tensors="pt")["pixel_values"].to(device)
