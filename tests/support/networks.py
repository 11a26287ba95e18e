"""Small TorchScript networks in the places of VGG16 and of rewards, written when they are asked for."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch


class Vgg(torch.nn.Module):
    """Called as StyleGAN's VGG16: random convolutions, of which squared distances are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        assert return_lpips
        assert not resize_images
        fine = torch.tanh(self.first(img / 127.5 - 1))
        coarse = torch.tanh(self.second(torch.nn.functional.avg_pool2d(fine, 2)))
        both = [fine.flatten(1) / fine[0].numel() ** 0.5, coarse.flatten(1) / coarse[0].numel() ** 0.5]
        return torch.cat(both, dim=1)


class MeanRed(torch.nn.Module):
    """How red an image is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert bool((images >= 0).all()) and bool((images <= 1).all())  # noqa: PT018 - TorchScript
        return images[:, 0].flatten(1).mean(1)


class RedOfPrompt(torch.nn.Module):
    """How red an image is, times the mean of what the network reads of its prompt."""

    def forward(self, images: torch.Tensor, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        return images[:, 0].flatten(1).mean(1) * embeddings["prompt_embeds"].flatten(1).mean(1)


class RedOfTokens(torch.nn.Module):
    """How red an image is, times the number of the prompt's tokens."""

    def forward(self, images: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return images[:, 0].flatten(1).mean(1) * attention_mask.sum(1)


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="distill-networks-")


@cache
def network_file(kind: type[torch.nn.Module]) -> Path:
    """The TorchScript file of such a network, its weights from a seed."""
    path = Path(_folder().name) / f"{kind.__name__.lower()}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.jit.script(kind()).save(path)
    return path
