"""A small network that finds what a scene shows, answers what its caption asks for, and rates the image's quality.

It is trained on composed scenes (`benchmarks/scenes.py judge`) and ships beside their miniature teacher. A caption asks
for things, their colours, the relation of the first two, a place and a time of day, and for nothing else; every
question is answered by itself, and a scene is right when all answers are. The features serve for a Fréchet distance,
which is to be called "Fréchet distance in judge features" and never FID.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .evaluators import QUESTIONS
from .miniature_classifier import CONFIG_NAME, WEIGHTS_NAME, convolution


class Thing(NamedTuple):
    """A thing that a caption mentions: the index of its kind, and of its colour where that is named."""

    kind: int
    colour: int | None


@dataclass(frozen=True)
class Asked:
    """What a caption asks for; None where it leaves something open."""

    things: tuple[Thing, ...]
    relation: tuple[int, int] | None
    """Direction (x to the right, y downwards) from the second thing to the first."""
    place: int | None
    time: int | None


@dataclass(frozen=True)
class Words:
    """What captions can mention, in the order of the network's outputs.

    Args:
        kinds: Nouns.
        colours: Adjectives that stand before a noun.
        relations: Phrase between two nouns -> direction (x, y) from the second thing to the first.
        locations: Phrases.
        times: Phrases.
    """

    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    relations: dict[str, tuple[int, int]]
    locations: tuple[str, ...]
    times: tuple[str, ...]

    def read(self, caption: str) -> Asked:
        """Return what a caption asks for; words that are not known are passed over."""
        text = " ".join(re.findall(r"[a-z]+", caption.lower()))
        things, spans = [], []
        for found in re.finditer(rf"(?:\b({'|'.join(self.colours)}) )?\b({'|'.join(self.kinds)})\b", text):
            colour = None if found[1] is None else self.colours.index(found[1])
            things.append(Thing(self.kinds.index(found[2]), colour))
            spans.append(found.span())
        relation = None
        if len(things) > 1:
            between = f" {text[spans[0][1] : spans[1][0]]} "
            relation = next((way for phrase, way in self.relations.items() if f" {phrase} " in between), None)
        where, when = (
            [index for index, phrase in enumerate(phrases) if f" {phrase} " in f" {text} "]
            for phrases in (self.locations, self.times)
        )
        return Asked(
            tuple(things), None if relation is None else (relation[0], relation[1]), where[0] if where else None,
            when[0] if when else None,
        )  # fmt: skip


class Seen(NamedTuple):
    """The network's outputs for images of S x S pixels; h = S / 4."""

    kinds: Tensor
    """Logits (B, K, h, h): does a thing of this kind have its centre in this cell?"""
    colours: Tensor
    """Logits (B, C, h, h) of the colour of the thing at a cell."""
    place: Tensor
    """Logits (B, P)."""
    time: Tensor
    """Logits (B, T)."""
    quality: Tensor
    """Logits (B,): high for images like those of the data, low for blurred, noisy or blended ones."""


class SceneJudge(nn.Module):
    """Convolutions over three levels that find the centres of things, and linear heads over the whole image.

    Args:
        words: What captions can mention, as :class:`Words` or as the dictionary of its fields.
        channels: Width at a half, a quarter and an eighth of the image's side; the last is the number of features F.
        resolution: Side in pixels of the images it was trained on; others are resized to it.
        threshold: Probability from which a thing that was asked for counts as seen.
        stray: Probability from which one that was not does.
    """

    def __init__(
        self,
        words: Words | dict[str, Any],
        channels: Sequence[int] = (32, 64, 128),
        resolution: int = 64,
        threshold: float = 0.3,
        stray: float = 0.5,
    ) -> None:
        super().__init__()
        self.words = words if isinstance(words, Words) else Words(**{k: _tuples(v) for k, v in words.items()})
        self.channels, self.resolution = tuple(channels), resolution
        self.threshold, self.stray = threshold, stray
        half, quarter, eighth = self.channels
        self.first = nn.Sequential(convolution(3, half, 2), convolution(half, half, 1))
        self.middle = nn.Sequential(convolution(half, quarter, 2), convolution(quarter, quarter, 1))
        self.last = nn.Sequential(
            convolution(quarter, eighth, 2), convolution(eighth, eighth, 1), convolution(eighth, eighth, 1)
        )
        self.join = nn.Sequential(convolution(quarter + eighth, quarter, 1), convolution(quarter, quarter, 1))
        self.kinds = nn.Conv2d(quarter, len(self.words.kinds), 1)
        self.colours = nn.Conv2d(quarter, len(self.words.colours), 1)
        self.place, self.time = (nn.Linear(eighth, len(w)) for w in (self.words.locations, self.words.times))
        self.quality = nn.Linear(half + quarter + eighth, 1)

    def _levels(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = next(self.parameters())
        images = images.to(weight.device, weight.dtype)
        size = (self.resolution, self.resolution)
        if images.shape[-2:] != size:
            images = nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        first = self.first(images * 2 - 1)
        middle = self.middle(first)
        return first, middle, self.last(middle)

    def features(self, images: Tensor) -> Tensor:
        """Return features (B, F) of images (B, 3, H, W) in [0, 1]."""
        return self._levels(images)[-1].mean(dim=(-2, -1))

    def forward(self, images: Tensor) -> Seen:
        """Return what the network sees in images (B, 3, H, W) in [0, 1]."""
        levels = self._levels(images)
        wide = nn.functional.interpolate(levels[2], scale_factor=2, mode="nearest")
        cells = self.join(torch.cat([levels[1], wide], dim=1))
        means = [level.mean(dim=(-2, -1)) for level in levels]
        return Seen(
            self.kinds(cells), self.colours(cells), self.place(means[-1]), self.time(means[-1]),
            self.quality(torch.cat(means, dim=-1)).squeeze(-1),
        )  # fmt: skip

    @torch.no_grad()
    def answers(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return question -> 1 right, 0 wrong, -1 not asked (B,), for images (B, 3, H, W) in [0, 1]."""
        seen = self(images)
        found = _Found(*(value.cpu() for value in _peaks(seen)))
        rows = [self._answer(found, index, self.words.read(caption)) for index, caption in enumerate(captions)]
        return {question: torch.tensor([row[question] for row in rows]) for question in QUESTIONS}

    def _answer(self, found: _Found, index: int, asked: Asked) -> dict[str, int]:
        kinds = [thing.kind for thing in asked.things]
        there = [bool(found.score[index, kind] >= self.threshold) for kind in kinds]
        others = [kind for kind in range(len(self.words.kinds)) if kind not in kinds]
        named = [thing for thing in asked.things if thing.colour is not None]
        coloured = [found.colour[index, thing.kind] == thing.colour for thing in named]
        answers = {
            "things": int(all(there)) if kinds else -1,
            "nothing_else": int(not bool((found.score[index, others] >= self.stray).any())) if kinds else -1,
            "colours": int(all(coloured) and all(there)) if named else -1,
            "relation": -1,
            "place": -1 if asked.place is None else int(found.place[index] == asked.place),
            "time": -1 if asked.time is None else int(found.time[index] == asked.time),
        }
        if asked.relation is not None:
            gap = found.centre[index, kinds[0]] - found.centre[index, kinds[1]]
            way = torch.tensor(asked.relation, dtype=gap.dtype)
            along, across = float(gap @ way), float((gap @ way.flip(0)).abs())
            answers["relation"] = int(all(there[:2]) and along > across)
        return answers

    @torch.no_grad()
    def agreement(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return, (B,) bool, if each image shows all that its caption asks for."""
        return torch.stack([value != 0 for value in self.answers(images, captions).values()]).all(dim=0)

    @torch.no_grad()
    def rate(self, images: Tensor) -> Tensor:
        """Return the quality (B,) in [0, 1] of images (B, 3, H, W) in [0, 1]; that of the data is near 1."""
        return self(images).quality.sigmoid()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (half precision)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        words = {field.name: getattr(self.words, field.name) for field in fields(self.words)}
        config = {
            "words": words, "channels": self.channels, "resolution": self.resolution, "threshold": self.threshold,
            "stray": self.stray,
        }  # fmt: skip
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SceneJudge:
        """Load a judge in evaluation mode, without gradients."""
        folder = Path(folder)
        judge = cls(**json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
        judge.load_state_dict(load_file(folder / WEIGHTS_NAME))
        return judge.eval().requires_grad_(False)


class _Found(NamedTuple):
    """Of each image and kind, at the cell where a thing of that kind is likeliest."""

    score: Tensor  # (B, K)
    centre: Tensor  # (B, K, 2), x and y in cells
    colour: Tensor  # (B, K)
    place: Tensor  # (B,)
    time: Tensor  # (B,)


def _peaks(seen: Seen) -> _Found:
    count, kinds, _, width = seen.kinds.shape
    score, cell = seen.kinds.flatten(2).max(dim=-1)
    colours = seen.colours.argmax(dim=1).flatten(1).gather(1, cell)
    centre = torch.stack([cell % width, cell // width], dim=-1).float()
    return _Found(
        score.sigmoid(), centre.view(count, kinds, 2), colours, seen.place.argmax(dim=-1), seen.time.argmax(dim=-1)
    )


def _tuples(value: Any) -> Any:
    """Return the lists of a JSON value as tuples."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(value) if isinstance(value, list) else value
