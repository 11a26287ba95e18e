"""Configs of published denoisers, as data: numbers alone, to count weights and memory of the real sizes.

Each entry: the family, the number of parameters in billions, as published, the denoiser's config where it differs from
the defaults of its class, and that of the autoencoder.
"""

from __future__ import annotations

from typing import Any

KL8 = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
KL16 = {**KL8, "latent_channels": 16}

KL32 = {**KL8, "latent_channels": 32}

PUBLISHED: dict[str, dict[str, Any]] = {
    # https://github.com/black-forest-labs/flux2/blob/main/src/flux2/model.py: Flux2Params, Klein9BParams, Klein4BParams
    "flux2-dev": {
        "family": "flux2-dev",
        "billions": 32.0,
        "vae": KL32,
        "denoiser": {
            "in_channels": 128, "joint_attention_dim": 15360, "num_attention_heads": 48, "num_layers": 8,
            "num_single_layers": 48, "guidance_embeds": True,
        },
    },
    "flux2-klein-9b": {
        "family": "flux2",
        "billions": 9.0,
        "vae": KL32,
        "denoiser": {
            "in_channels": 128, "joint_attention_dim": 12288, "num_attention_heads": 32, "num_layers": 8,
            "num_single_layers": 24, "guidance_embeds": False,
        },
    },
    "flux2-klein-4b": {
        "family": "flux2",
        "billions": 3.88,  # 7.75 GB in bf16
        "vae": KL32,
        "denoiser": {
            "in_channels": 128, "joint_attention_dim": 7680, "num_attention_heads": 24, "num_layers": 5,
            "num_single_layers": 20, "guidance_embeds": False,
        },
    },
    # https://huggingface.co/lodestones/Chroma1-HD: the defaults of its class in diffusers
    "chroma": {"family": "chroma", "billions": 8.9, "vae": KL16, "denoiser": {"in_channels": 64}},
    # https://huggingface.co/fal/AuraFlow/blob/main/transformer/config.json; v0.3 has 9216 positions
    "auraflow": {
        "family": "auraflow",
        "billions": 6.8,
        "vae": KL8,
        "denoiser": {
            "in_channels": 4, "num_mmdit_layers": 4, "num_single_dit_layers": 32, "attention_head_dim": 256,
            "num_attention_heads": 12, "joint_attention_dim": 2048, "caption_projection_dim": 3072,
            "pos_embed_max_size": 9216,
        },
    },
}  # fmt: skip
