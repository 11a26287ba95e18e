"""UNets that take, beside a prompt, its pooled embedding (B, P) and six time ids per sample: original height and width,
top and left of the crop, target height and width, in pixels.

References:
    Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, arXiv 2307.01952.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .unet import UNetFamily

if TYPE_CHECKING:
    from ...core.plugin_api.batch import Conditioning
    from ...core.plugin_api.family import MicroConditioning


class TimeIdsFamily(UNetFamily):
    """A UNet with ``addition_embed_type`` text_time."""

    def condition(self, embeds: Conditioning, micro: MicroConditioning) -> Conditioning:
        sizes = zip(micro.original_size, micro.crop_top_left, micro.target_size, strict=True)
        ids = [[*original, *crop, *target] for original, crop, target in sizes]
        device = embeds["prompt_embeds"].device
        return {**embeds, "time_ids": torch.tensor(ids, dtype=torch.float32, device=device)}

    def empty_conditioning(self, network: nn.Module) -> Conditioning | None:
        embeds = super().empty_conditioning(network)
        return embeds and {**embeds, "time_ids": torch.empty(1, 6, device="meta")}

    def prompt_dimensions(self, network: nn.Module) -> dict[str, int]:
        unet: Any = network
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        return {**super().prompt_dimensions(unet), "pooled_prompt_embeds": pooled}

    def added(self, cond: Conditioning, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"text_embeds": cond["pooled_prompt_embeds"].to(dtype), "time_ids": cond["time_ids"]}
