"""Autoencoders by their class in diffusers: sizes from the config, the distribution of an image, scaled latents.

Scaled latents are what the denoiser sees, (B, C, h, w), C and h of the family's own counting: FLUX.2 counts patches of
2 x 2 as one latent of four times the channels, Qwen-Image's autoencoder has a time axis, of one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError


class PlainAutoencoder:
    """``AutoencoderKL``: scaled latents are (z - shift) scaling_factor / std; the base of all others."""

    has_gradient = True
    """Whether images are decoded with a gradient (:mod:`.pixels` knows its layers)."""

    def channels(self, config: Mapping[str, Any]) -> int:
        """Return the number of channels C of the scaled latents."""
        return int(config.get("latent_channels", 4))

    def factor(self, config: Mapping[str, Any]) -> int:
        """Return the pixels per scaled latent along an edge."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and deviation of the autoencoder's own latents of images (B, 3, H, W) in [-1, 1]; the deviation
        is None where it has none.
        """
        posterior = vae.encode(pixels).latent_dist
        return posterior.mode(), posterior.std

    def scaled(self, vae: Any, latents: Tensor) -> Tensor:
        """Return scaled latents (B, C, h, w) from the autoencoder's own."""
        shift, std = _statistics(vae.config, latents)
        return (latents - shift) * vae.config.scaling_factor / std

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        """Return the autoencoder's own latents from scaled ones (B, C, h, w), which have its type and device."""
        shift, std = _statistics(vae.config, latents)
        return latents * std / vae.config.scaling_factor + shift

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about in [-1, 1], of the autoencoder's own latents."""
        return vae.decode(latents, return_dict=False)[0]


class DeepCompression(PlainAutoencoder):
    """``AutoencoderDC`` (Sana): no distribution, no shift; it compresses 32 times.

    References:
        Chen et al., Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models, arXiv 2410.10733.
    """

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config.get("latent_channels", 32))

    def factor(self, config: Mapping[str, Any]) -> int:
        return 2 ** (len(config["encoder_block_out_channels"]) - 1)

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        return vae.encode(pixels, return_dict=False)[0], None

    def scaled(self, vae: Any, latents: Tensor) -> Tensor:
        return latents * vae.config.scaling_factor

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        return latents / vae.config.scaling_factor


class PatchedAutoencoder(PlainAutoencoder):
    """``AutoencoderKLFlux2``: patches of 2 x 2 latents are one of four times the channels, normed by the running
    statistics that the weights hold.
    """

    def channels(self, config: Mapping[str, Any]) -> int:
        return 4 * int(config.get("latent_channels", 32))

    def factor(self, config: Mapping[str, Any]) -> int:
        return 2 * super().factor(config)

    def scaled(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._running(vae, latents)
        return (patched(latents) - mean) / std

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._running(vae, latents)
        return unpatched(latents * std + mean)

    def _running(self, vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        return mean.to(latents), (variance + vae.config.batch_norm_eps).sqrt().to(latents)


class FrameAutoencoder(PlainAutoencoder):
    """``AutoencoderKLQwenImage``: a video's autoencoder, for one frame; scaled latents are (z - mean) / std."""

    has_gradient = False

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config.get("z_dim", 16))

    def factor(self, config: Mapping[str, Any]) -> int:
        return 2 ** len(config["temperal_downsample"])

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, std = super().distribution(vae, pixels.unsqueeze(2))
        assert std is not None
        return mean.squeeze(2), std.squeeze(2)

    def scaled(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae.config, latents)
        return (latents - mean) / std

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae.config, latents)
        return (latents * std + mean).unsqueeze(2)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return super().decode(vae, latents).squeeze(2)


class TransparentAutoencoder(FrameAutoencoder):
    """``AutoencoderKLQwenImage21``: the same with opacity as fourth channel: 1 for images, which are shown on white."""

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().distribution(vae, torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        colours, opacity = super().decode(vae, latents).split([3, 1], dim=1)
        return 1 + (colours - 1) * (opacity + 1) / 2


AUTOENCODERS: Mapping[str, PlainAutoencoder] = {
    "AutoencoderKL": PlainAutoencoder(),
    "AutoencoderTiny": PlainAutoencoder(),
    "AutoencoderDC": DeepCompression(),
    "AutoencoderKLFlux2": PatchedAutoencoder(),
    "AutoencoderKLQwenImage": FrameAutoencoder(),
    "AutoencoderKLQwenImage21": TransparentAutoencoder(),
}
"""Class in diffusers -> its kind."""


def patched(latents: Tensor) -> Tensor:
    """Return latents (B, 4 C, h/2, w/2) whose channels are patches of 2 x 2 of `latents` (B, C, h, w)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, 4 * channels, height // 2, width // 2)


def unpatched(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) from their patches; the inverse of :func:`patched`."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return patches.reshape(batch, channels // 4, 2 * height, 2 * width)


def kind_of(vae: Any) -> PlainAutoencoder:
    """Return the kind of a loaded autoencoder: that of its class or of the nearest it is made from, else the plain."""
    known = (AUTOENCODERS[each.__name__] for each in type(vae).__mro__ if each.__name__ in AUTOENCODERS)
    return next(known, AUTOENCODERS["AutoencoderKL"])


def kind_named(name: str) -> PlainAutoencoder:
    """Return the kind of a class of diffusers. Raises UserError for one that is not known here."""
    if name not in AUTOENCODERS:
        raise UserError(f"autoencoders of the class {name} are not known here", f"known: {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name]


def _statistics(config: Mapping[str, Any], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the latents from the autoencoder's config, else 0 and 1; shape (1, C or 1, 1, 1)."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    return latents.new_tensor(mean).view(1, -1, 1, 1), latents.new_tensor(std).view(1, -1, 1, 1)
