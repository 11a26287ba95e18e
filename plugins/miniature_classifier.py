"""A small image classifier that decides whether an image shows what its caption says.

It is trained on the scenes of the miniature teacher (`benchmarks/miniature.py judge`) and ships beside it. One head per
attribute (kind of thing, colour of the ground, texture of the ground). The penultimate features serve for a Frechet
distance, which is to be called "Frechet distance in judge features" and never FID.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"


class MiniatureClassifier(nn.Module):
    """Four convolution stages, a global average, and one linear head per attribute.

    Args:
        vocabulary: Attribute -> the words for its values, in the order of the logits.
        channels: Width of the four stages; the last is the number of features F.
        resolution: Side in pixels of the images it was trained on; others are resized to it.
    """

    def __init__(
        self,
        vocabulary: dict[str, list[str]],
        channels: Sequence[int] = (32, 64, 96, 128),
        resolution: int = 32,
    ) -> None:
        super().__init__()
        self.vocabulary = {attribute: list(words) for attribute, words in vocabulary.items()}
        self.channels, self.resolution = tuple(channels), resolution
        stages, width = [], 3
        for index, out in enumerate(self.channels):
            stride = 1 if index == 0 else 2
            stages += [convolution(width, out, stride), convolution(out, out, 1) if 0 < index < 3 else nn.Identity()]
            width = out
        self.trunk = nn.Sequential(*stages)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in self.vocabulary.items()})

    def features(self, images: Tensor) -> Tensor:
        """Return features (B, F) of images in [0, 1], (B, 3, H, W)."""
        weight = next(self.parameters())
        images = images.to(weight.device, weight.dtype)
        if images.shape[-2:] != (self.resolution, self.resolution):
            size = (self.resolution, self.resolution)
            images = nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        return self.trunk(images * 2 - 1).mean(dim=(-2, -1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return attribute -> logits (B, number of its values) of images in [0, 1], (B, 3, H, W)."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    def mentioned(self, caption: str) -> dict[str, int]:
        """Return the attributes that a caption mentions, each with the index of its value."""
        words = re.findall(r"[a-z]+", caption.lower())
        return {
            attribute: values.index(word)
            for attribute, values in self.vocabulary.items()
            for word in reversed(words)  # so that the first mention wins
            if word in values
        }

    @torch.no_grad()
    def agreement(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return, (B,) bool, if each image shows every attribute that its caption mentions; others do not count."""
        found = {name: logits.argmax(dim=-1).tolist() for name, logits in self(images).items()}
        return torch.tensor(
            [
                all(found[attribute][index] == value for attribute, value in self.mentioned(caption).items())
                for index, caption in enumerate(captions)
            ],
            dtype=torch.bool,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (half precision)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"vocabulary": self.vocabulary, "channels": self.channels, "resolution": self.resolution}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {
            name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(state, folder / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MiniatureClassifier:
        """Load a classifier in evaluation mode, without gradients."""
        folder = Path(folder)
        classifier = cls(**json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
        classifier.load_state_dict(load_file(folder / WEIGHTS_NAME))
        return classifier.eval().requires_grad_(False)


def convolution(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """Return a 3 x 3 convolution with batch norm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )
