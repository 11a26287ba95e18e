r"""Frozen networks beside the base, for losses and scores: a TorchScript file, and LPIPS by one.

    LPIPS(x, y) = || f(x) - f(y) ||^2          f: weighted and normed features of a VGG16

A TorchScript file is code: it is named by the user, and never fetched.

References:
    Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), arXiv 1801.03924.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import DistillError, UserError

if TYPE_CHECKING:
    from .method import ModuleSetup

METRICS_ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
"""Where StyleGAN's networks of published metrics lie; people download them."""
LPIPS_NETWORK = "vgg16.pt"
"""Name of the one for LPIPS."""


class StoredNetwork(ABC):
    """A role's factory whose network comes from a file, equal where the file and the settings are."""

    @abstractmethod
    def __call__(self, setup: ModuleSetup) -> nn.Module:
        """Load the network on the device of `setup`."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Return the bytes of its file, for the estimate of a run's memory; 0 where they are not known."""


@dataclass(frozen=True)
class TorchScriptNetwork(StoredNetwork):
    """Loads a TorchScript file.

    Attributes:
        path: The file.
    """

    path: Path

    def __call__(self, setup: ModuleSetup) -> nn.Module:
        """Load the network on the device of `setup`."""
        return Repeatable(load_torchscript(self.path, str(setup.device)))

    def stored_bytes(self) -> int:
        """Return the bytes of the file."""
        return self.path.stat().st_size if self.path.is_file() else 0


class Repeatable(nn.Module):
    """A TorchScript network that computes alike at every call.

    TorchScript watches its first calls and then rewrites the code, which rounds otherwise: a resumed run, whose calls
    are the first ones again, would not be the same run.

    Args:
        network: A TorchScript network, called with images first.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, *args: Any, **settings: Any) -> Tensor:
        """Return what the network gives for images (B, 3, H, W), in the type of its weights."""
        with torch.jit.optimized_execution(False):
            return self.network(like_weights(self.network, images), *args, **settings)


@dataclass(frozen=True)
class LpipsNetwork(TorchScriptNetwork):
    """Loads the network of LPIPS as :class:`Lpips`."""

    def __call__(self, setup: ModuleSetup) -> nn.Module:
        """Load the network on the device of `setup`."""
        return Lpips(super().__call__(setup))


class Lpips(nn.Module):
    """LPIPS of pairs of images, with a gradient to both.

    Args:
        network: As of :func:`lpips_features`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distance (B,) of images and others, each (B, 3, H, W) with 0 black and 1 white."""
        ours, theirs = (lpips_features(self.network, 255 * each) for each in (images, others))
        return (ours - theirs).square().sum(dim=1)


def lpips_features(network: Any, pixels: Tensor) -> Tensor:
    """Return features (B, F) whose squared distance is the LPIPS.

    Args:
        network: StyleGAN's VGG16, or any TorchScript that is called alike.
        pixels: Images (B, 3, H, W), 0 black and 255 white.
    """
    return network(pixels, resize_images=False, return_lpips=True).flatten(1)


def like_weights(network: nn.Module, images: Tensor) -> Tensor:
    """Return images in the type of the network's weights; as they are where it has none."""
    weight = next(network.parameters(), None)
    return images if weight is None else images.to(weight.dtype)


def load_torchscript(path: Path, device: str) -> Any:
    """Load a TorchScript network, in eval mode on `device`. Raises DistillError for a file of another kind."""
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise DistillError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error


def check_file(path: Path | None, *, key: str, remedy: str) -> None:
    """Raise UserError unless the file that the key names is there.

    Args:
        path: The file.
        key: Dotted path of the key.
        remedy: Where people get such a file, as the end of a sentence.
    """
    if path is None:
        raise UserError(f"{key} is missing", f"name the file: {remedy}")
    if not path.is_file():
        raise UserError(f"{key} = {str(path)!r}: there is no such file", f"name one that is there: {remedy}")
