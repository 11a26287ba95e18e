"""Autoencoders that decode latents with a gradient: the model's own, its layers recomputed, or a tiny one.

References:
    Chen et al., Training Deep Nets with Sublinear Memory Cost (recomputation), arXiv 1604.06174.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.errors import UserError
from ..files.hub import hub_errors, hub_file, hub_folder
from ..files.open_source import open_hub
from ..files.reading import quiet_libraries
from .autoencoders import kind_named
from .encoders import decoded_pixels

if TYPE_CHECKING:
    from ..files.architecture import Architecture

ELEMENTS_PER_PIXEL = {"AutoencoderTiny": 10.2, "AutoencoderKL": 19.3, "AutoencoderKLFlux2": 19.3, "AutoencoderDC": 18.4}
"""Elements of activations per pixel and channel of the finest level while one image is decoded with its gradient, a
layer recomputed at a time. Measured on TAESD and on SDXL's and Sana's autoencoders in fp32, 512 x 512 pixels, on a CPU.
"""
OTHERS = ("AutoencoderTiny", "AutoencoderKL")
"""Classes of autoencoders that may decode in place of the model's own."""


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Return images (B, 3, H, W), 0 black and 1 white but not clamped, of scaled `latents` (B, C, h, w), with their
    gradient; the decoder's layers are computed again in the backward pass.
    """
    with recomputed(vae.decoder):
        pixels = decoded_pixels(vae, latents)
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32)) * 0.5 + 0.5


@contextmanager
def recomputed(decoder: nn.Module) -> Iterator[None]:
    """Keep of each layer of `decoder` that runs inside the block nothing but its input for the backward pass.

    diffusers' own checkpointing keeps a whole level, whose finest takes more than the rest of the decoder.
    """
    layers: list[Any] = list(_layers(decoder))
    for layer in layers:
        # a decoder draws nothing, so that no state of a generator has to be kept
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _layers(decoder: nn.Module) -> Iterator[nn.Module]:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, EfficientViTBlock, ResBlock
    from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    kinds = (Attention, AutoencoderTinyBlock, ResnetBlock2D, Upsample2D, DCUpBlock2d, EfficientViTBlock, ResBlock)
    return (module for module in decoder.modules() if isinstance(module, kinds))


# -- another autoencoder than the model's -----------------------------------------------------------------------------


class OtherDecoder:
    """An autoencoder of its own folder or hub repository, as TAESDXL.

    Args:
        name: Folder with ``config.json``, or hub id.
        architecture: The model's, for the hub's messages.
    """

    def __init__(self, name: str, architecture: Architecture) -> None:
        self.name, self._architecture = name, architecture
        self._local = Path(name).expanduser()

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its ``config.json``."""
        if self._local.is_dir():
            path = self._local / "config.json"
            if not path.is_file():
                raise UserError(
                    f"pixel_decoder = {self.name!r} has no config.json", "name the autoencoder's own folder"
                )
        else:
            repository = open_hub(self.name, self._architecture).name
            with hub_errors(repository, "config.json"):
                path = hub_file(repository, "config.json")
        return json.loads(path.read_text(encoding="utf-8"))

    def check(self, *, channels: int, factor: int) -> None:
        """Raise UserError unless it decodes latents of `channels` to images `factor` times as large per edge."""
        name = str(self.config.get("_class_name"))
        if name not in OTHERS:
            known = " or ".join(OTHERS)
            raise UserError(f"pixel_decoder = {self.name!r} is of the class {name}", f"name one of the class {known}")
        kind = kind_named(name)
        made = (kind.channels(self.config), kind.factor({"block_out_channels": widths(self.config)}))
        if made != (channels, factor):
            raise UserError(
                f"pixel_decoder = {self.name!r} decodes {made[0]} channels to {made[1]} pixels per latent, and this "
                f"model's latents have {channels} channels and {factor} pixels",
                "name one that was made for this model's latents (TAESDXL for SDXL, TAESD3 for Stable Diffusion 3, "
                "TAEF1 for FLUX.1), or leave the key out",
            )
        if self._local.is_dir() and not list(self._local.glob("*.safetensors")):
            raise UserError(
                f"pixel_decoder = {self.name!r} has no safetensors weights",
                "pickled weights can run code and are never loaded: convert them with save_pretrained where you trust "
                "them",
            )

    def load(self, device: str) -> Any:
        """Load it in fp32, frozen, on `device`: it is small, and a gradient wants more than half precision."""
        import diffusers

        folder = self._local
        if not folder.is_dir():
            with hub_errors(self.name, "download"):
                folder = hub_folder(self.name, allow_patterns=["config.json", "*.safetensors"])
        with quiet_libraries():
            vae: Any = getattr(diffusers, self.config["_class_name"]).from_pretrained(
                folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        return vae.requires_grad_(False).eval().to(device)


# -- memory -----------------------------------------------------------------------------------------------------------


def widths(config: Mapping[str, Any]) -> list[int]:
    """Return the channels of a decoder's levels, the finest first, from the autoencoder's config."""
    own = config.get("decoder_block_out_channels")
    if own and config.get("_class_name") == "AutoencoderTiny":
        return list(reversed(own))
    return list(own or config["block_out_channels"])


def decoding_bytes(config: Mapping[str, Any], num_pixels: int, *, item: int) -> int:
    """Estimate the bytes of an autoencoder and of what it keeps while one image is decoded with its gradient.

    Args:
        config: The autoencoder's config.
        num_pixels: Pixels of the image.
        item: Bytes of a number.
    """
    import diffusers

    name = config.get("_class_name", "AutoencoderKL")
    kind: Any = getattr(diffusers, name)
    with quiet_libraries(), torch.device("meta"):
        weights = sum(weight.numel() for weight in kind.from_config(dict(config)).parameters())
    return round(item * (weights + ELEMENTS_PER_PIXEL[name] * widths(config)[0] * num_pixels))
