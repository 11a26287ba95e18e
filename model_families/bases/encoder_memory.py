"""What text encoders, autoencoder and the denoiser's activations take, from configs alone: on the meta device."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from ...core.utils.simulated_memory import peak_bytes
from ..calls.autoencoders import kind_of
from ..files.empty import empty_network
from .model import DiffusersModel

if TYPE_CHECKING:
    from torch import nn

    from ...core.plugin_api.batch import Conditioning

_peaks: dict[tuple[str, bool, tuple[int, ...], bool], int] = {}


class EncoderMemory(DiffusersModel):
    """The estimates of a family whose models diffusers reads; a base of :class:`.DiffusersFamily`."""

    prompt_positions: int | None = None
    """Length L of the states (B, L, D) that the denoiser is given of a prompt; None where it is not known."""

    def empty_conditioning(self, network: nn.Module) -> Conditioning | None:
        if self.prompt_positions is None:
            return None
        positions = {name: [] if name.startswith("pooled") else [self.prompt_positions] for name in self.embed_keys}
        widths = self.prompt_dimensions(network)
        return {  # a mask of positions has no width
            name: torch.empty(1, *positions[name], *([widths[name]] if name in widths else []), device="meta")
            for name in self.embed_keys
        }

    def text_bytes(self) -> int:
        source, parts = self._source, self.architecture.encoders
        networks = (self._empty_part(part) for part in parts if part not in self.left_out and source.has(part))
        return self._text_dtype().itemsize * sum(weight.numel() for one in networks for weight in one.parameters())

    def autoencoder_bytes(self) -> int:
        weights = sum(weight.numel() for weight in self._empty_part("vae").parameters())
        return self._vae_dtype().itemsize * weights

    def encoding_bytes(self, size: tuple[int, int], *, images: int) -> int:
        at_once = min(images, max(1, self.config.encoded_pixels_at_once // (size[0] * size[1])))
        return self._peak((at_once, 3, size[1], size[0]), decodes=False)

    def generating_bytes(self, size: tuple[int, int], *, images: int) -> int:
        at_once = min(images, max(1, self.config.decoded_pixels_at_once // (size[0] * size[1])))
        height, width = size[1] // self.scale_factor, size[0] // self.scale_factor
        return self._peak((at_once, self.latent_channels, height, width), decodes=True)

    def _empty_part(self, part: str) -> Any:
        source = self._vae_source if part == "vae" else self._source
        return empty_network(self.architecture, part, source.config(f"{part}/config.json"))

    def _peak(self, shape: tuple[int, ...], *, decodes: bool) -> int:
        """Return the bytes of the autoencoder's input, output and activations for a batch (B, C, h, w)."""
        vae, tiled = self._empty_part("vae"), self.config.vae_tiling
        key = (repr(sorted(vae.config.items(), key=str)), decodes, shape, tiled)
        if key not in _peaks:
            vae = copy.deepcopy(vae)
            if tiled:
                vae.enable_tiling()
            kind = kind_of(vae)
            own = kind.unscaled(vae, torch.empty(shape, device="meta")).shape if decodes else shape
            call: Any = kind.decode if decodes else kind.distribution
            _peaks[key] = peak_bytes(lambda: call(vae, torch.empty(own, device="meta")))
        return _peaks[key] * self._vae_dtype().itemsize // torch.float32.itemsize
