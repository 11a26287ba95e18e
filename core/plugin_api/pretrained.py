r"""Pretrained networks of transformers for scores and losses: loading, availability, their name in figures.

A network of images and text that was trained on people's choices gives a reward (PickScore):

    r = exp(logit_scale) cos(image, prompt)

References:
    Kirstain et al., Pick-a-Pic (PickScore), arXiv 2305.01569.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..settings.types import HubOrPath
from .auxiliary import StoredNetwork

if TYPE_CHECKING:
    from PIL.Image import Image

    from .method import ModuleSetup

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
    return config.label or label_from(config.model)


def label_from(name: str) -> str:
    """Return the last part of a path or id as letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.rstrip("/").rpartition("/")[2].lower()).strip("_")


def problem(key: str, config: Any) -> str | None:
    """Return why the network that the key names is not available here, and the remedy; None where it is."""
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


# -- as a loss ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a hub id or folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def tokens_of(tokenizer: Any, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and their mask, each (B, L), padded to the tokenizer's full length and cut to it."""
    found = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    return found.input_ids.to(device), found.attention_mask.to(device)


@dataclass(frozen=True)
class ImageTextNetwork(StoredNetwork):
    """Makes the module of a network of images and text, as a CLIP, whose scaled cosine is the reward of an image.

    Attributes:
        model: Hub id or local folder, with safetensors.
        processor: Hub id or folder of its processor; None: the model's own.
        revision: Revision of the hub model.
    """

    model: str
    processor: str | None = None
    revision: str | None = None

    def __call__(self, setup: ModuleSetup) -> nn.Module:
        """Load it in fp32 on the device of `setup`."""
        return ScaledCosine(*load(self, str(setup.device), images_only=True))

    def stored_bytes(self) -> int:
        """Return the bytes of its files, where they are in a local folder."""
        return sum(file.stat().st_size for file in Path(self.model).expanduser().glob("*.safetensors"))


class ScaledCosine(nn.Module):
    """exp(logit_scale) cos(image, prompt), with the gradient to the image.

    Args:
        model: A CLIP of transformers.
        processor: Its image processor, whose size, crop, mean and deviation are applied with a gradient.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self._processor = model, processor

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return rewards (B,) of images (B, 3, H, W) in [0, 1] and tokens (B, L) of their prompts."""
        seen = processed(self._processor, images.to(self.model.dtype))
        output = self.model(pixel_values=seen, input_ids=input_ids, attention_mask=attention_mask)
        # transformers gives both embeddings normed
        return self.model.logit_scale.exp() * (output.image_embeds * output.text_embeds).sum(-1)


def processed(processor: Any, images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] as an image processor of a CLIP makes them, with a gradient."""
    size = dict(processor.size)
    edge = size.get("shortest_edge")
    if edge is None:
        height, width = size["height"], size["width"]
    else:  # rounded down, as transformers does
        height, width = (edge * each // min(images.shape[-2:]) for each in images.shape[-2:])
    if (height, width) != tuple(images.shape[-2:]):
        images = nn.functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
    if processor.do_center_crop:
        crop = dict(processor.crop_size)
        top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
        images = images[..., top : top + crop["height"], left : left + crop["width"]]
    mean, std = (images.new_tensor(each).view(1, 3, 1, 1) for each in (processor.image_mean, processor.image_std))
    return (images - mean) / std
