"""Configs of published denoisers, as data: numbers alone, to count weights and memory of the real sizes.

Each entry: the family, the number of parameters in billions, as published, the denoiser's config where it differs from
the defaults of its class, that of the autoencoder, and that of the scheduler where the network needs it.
"""

from __future__ import annotations

from typing import Any

KL8 = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
KL16 = {**KL8, "latent_channels": 16}

PUBLISHED: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Alpha-VLLM/Lumina-Image-2.0/blob/main/transformer/config.json
    "lumina2": {
        "family": "lumina2",
        "billions": 2.6,
        "vae": KL16,
        "denoiser": {
            "in_channels": 16, "hidden_size": 2304, "num_layers": 26, "num_refiner_layers": 2,
            "num_attention_heads": 24, "num_kv_heads": 8, "multiple_of": 256, "axes_dim_rope": [32, 32, 32],
            "axes_lens": [300, 512, 512], "cap_feat_dim": 2304, "norm_eps": 1e-5,
        },
    },
    # https://huggingface.co/PixArt-alpha/PixArt-Sigma-XL-2-1024-MS/blob/main/transformer/config.json
    "pixart-sigma": {
        "family": "pixart-sigma",
        "billions": 0.61,
        "vae": KL8,
        "denoiser": {
            "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
            "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 128, "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
    },
    # https://huggingface.co/Kwai-Kolors/Kolors-diffusers/blob/main/unet/config.json
    "kolors": {
        "family": "kolors",
        "billions": 2.58,
        "vae": KL8,
        "denoiser": {
            "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "attention_head_dim": [5, 10, 20],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 5632, "encoder_hid_dim": 4096,
            "encoder_hid_dim_type": "text_proj", "sample_size": 128,
        },
    },
    # https://huggingface.co/THUDM/CogView4-6B/blob/main/transformer/config.json
    "cogview4": {
        "family": "cogview4",
        "billions": 6.37,
        "vae": KL16,
        "denoiser": {
            "in_channels": 16, "out_channels": 16, "num_layers": 28, "attention_head_dim": 128,
            "num_attention_heads": 32, "text_embed_dim": 4096, "time_embed_dim": 512, "condition_dim": 256,
            "pos_embed_max_size": 128, "sample_size": 128, "rope_axes_dim": [256, 256],
        },
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_shift": 0.25,
            "max_shift": 0.75, "base_image_seq_len": 256, "time_shift_type": "linear",
        },
    },
}  # fmt: skip
