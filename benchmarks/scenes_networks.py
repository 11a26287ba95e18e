"""The parts of the miniature SDXL of scenes.

Every part is of the class and of the kind of configuration that SDXL itself has; only widths and depths are small.
"""

from __future__ import annotations

from typing import Any

import scenes_data as scenes
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from miniature_networks import text_config
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LATENT_CHANNELS, COMPRESSION = 12, 4
LATENT_SIZE = scenes.RESOLUTION // COMPRESSION
MAX_TOKENS, TEXT_WIDTH, POOLED = 40, 64, 64
REGISTERS = 4
"""Last states of a padded caption, each of which begins by holding one part of what it asks for."""


def new_vae() -> AutoencoderKL:
    """The SDXL autoencoder in small: three levels (compression 4), twelve latent channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 80),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=scenes.RESOLUTION,
        force_upcast=False,
    )


def new_unet() -> UNet2DConditionModel:
    """The SDXL UNet in small: three levels, attention in the lower two and most of it in the lowest, text_time."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(3, 4, 4),  # as in SDXL's own config: the number of heads
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + POOLED,
        norm_num_groups=16,
    )


class Teacher(nn.Module):
    """What is trained jointly: both text encoders and the UNet."""

    def __init__(self, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(text_config_of(tokenizers[0], "quick_gelu"))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config_of(tokenizers[1], "gelu"))
        self.unet = new_unet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """States (B, T, 2 * TEXT_WIDTH) and the pooled text (B, POOLED) of tokens (B, T) for each encoder."""
        first = self.text_encoder(tokens[0], output_hidden_states=True)
        second = self.text_encoder_2(tokens[1], output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return states, second.text_embeds

    def forward(
        self, noisy: Tensor, t: Tensor, tokens: tuple[Tensor, Tensor], time_ids: Tensor, keep: Tensor
    ) -> Tensor:
        """Predict the noise; `keep` (B,) is 0 where the caption is dropped: zeros for both embeddings, as in SDXL."""
        states, pooled = self.encode(tokens)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": time_ids}
        return self.unet(noisy, t, encoder_hidden_states=states * keep[:, None, None], added_cond_kwargs=added).sample


def text_config_of(tokenizer: CLIPTokenizer, activation: str, *, width: int = TEXT_WIDTH) -> Any:
    """Three layers, and as many tokens as captions of scenes have."""
    config = text_config(tokenizer, activation, width=width)
    config.max_position_embeddings, config.num_hidden_layers = MAX_TOKENS, 3
    return config
