"""Sizes of published denoisers, from the configs that their makers wrote: numbers alone, with where they stand.

A family's variant -> the denoiser's config, that of the autoencoder as far as latents go, and the size in parameters.
"""

from __future__ import annotations

from typing import Any

_SANA = {
    "in_channels": 32, "out_channels": 32, "attention_head_dim": 32, "caption_channels": 2304, "mlp_ratio": 2.5,
    "attention_bias": False, "sample_size": 32, "patch_size": 1, "norm_elementwise_affine": False, "norm_eps": 1e-6,
    "interpolation_scale": None,
}  # fmt: skip
_SANA_LARGE = {
    **_SANA, "num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
}  # fmt: skip
_DEEP = {"_class_name": "AutoencoderDC", "latent_channels": 32, "encoder_block_out_channels": [0] * 6}

# -- qwen-image, qwen-image-2, sana ------------------------------------------------------------------------------------
# Qwen-Image and 2.1: defaults of the classes in diffusers, which are the published models' (transformer_qwenimage.py,
# transformer_qwenimage21.py, autoencoder_kl_qwenimage*.py); sizes: https://huggingface.co/Qwen/Qwen-Image-2.1 (7B) and
# arXiv 2508.02324 (20B).
# Sana: scripts/convert_sana_to_diffusers.py of https://github.com/huggingface/diffusers; sizes: arXiv 2410.10629 (table
# of the models: 590M and 1604M) and arXiv 2501.18427 (4.8B, of which the transformer has 4.72B).
QWEN_AND_SANA: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "qwen-image": (
        "qwen-image",
        {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False,
            "axes_dims_rope": [16, 56, 56],
        },
        {"_class_name": "AutoencoderKLQwenImage", "z_dim": 16, "temperal_downsample": [False, True, True]},
        20.4e9,
    ),
    "qwen-image-2": (
        "qwen-image-2",
        {
            "patch_size": 1, "in_channels": 64, "out_channels": 64, "num_layers": 32, "attention_head_dim": 128,
            "num_attention_heads": 32, "context_in_dim": 4096, "mlp_ratio": 3, "axes_dims_rope": [16, 56, 56],
            "eps": 1e-6, "causal_condition": True,
        },
        {"_class_name": "AutoencoderKLQwenImage21", "z_dim": 64, "temperal_downsample": [False, True, True, True]},
        7.1e9,
    ),
    "sana-0.6b": (
        "sana",
        {
            **_SANA, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152, "num_layers": 28,
        },
        _DEEP,
        0.59e9,
    ),
    "sana-1.6b": ("sana", {**_SANA_LARGE, "num_layers": 20}, _DEEP, 1.604e9),
    "sana-1.5-4.8b": (
        "sana", {**_SANA_LARGE, "num_layers": 60, "qk_norm": "rms_norm_across_heads"}, _DEEP, 4.72e9
    ),
}  # fmt: skip
PUBLISHED = {**QWEN_AND_SANA}
