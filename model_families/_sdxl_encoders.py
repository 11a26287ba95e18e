"""What the text encoders and the autoencoder of an SDXL compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..core.batch import Conditioning
    from ._sdxl_source import TextEncoders


@torch.no_grad()
def encode_text(text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
    """Penultimate states of both encoders, concatenated (B, T, D1 + D2), and the second's pooled embedding (B, P)."""
    states, pooled = [], torch.empty(0)
    for tokenizer, encoder in zip(text.tokenizers, text.encoders, strict=True):
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    return {"prompt_embeds": torch.cat(states, dim=-1).cpu(), "pooled_prompt_embeds": pooled.cpu()}


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor, generator: Sequence[torch.Generator] | None) -> Tensor:
    """Scaled latents (B, C, h, w) of `pixels` (B, 3, H, W) in [-1, 1]: (z - mean) scaling_factor / std."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode()
    if generator is not None:
        noise = [
            torch.randn(mean.shape, generator=one, device=one.device).to(mean)
            for mean, one in zip(latents, generator, strict=True)
        ]
        latents = latents + posterior.std * torch.stack(noise)
    mean, std = _statistics(vae.config, latents)
    return (latents - mean) * vae.config.scaling_factor / std


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], float32, of scaled `latents`."""
    latents = latents.to(vae.device, vae.dtype)
    mean, std = _statistics(vae.config, latents)
    pixels = vae.decode(latents * std / vae.config.scaling_factor + mean, return_dict=False)[0]
    return (pixels.float() * 0.5 + 0.5).clamp(0, 1)


def _statistics(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents by the autoencoder's config, else 0 and 1; shape (1, C or 1, 1, 1)."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [0.0], [1.0]
    return latents.new_tensor(mean).view(1, -1, 1, 1), latents.new_tensor(std).view(1, -1, 1, 1)
