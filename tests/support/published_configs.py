"""Configs of published denoisers, as data: numbers alone, to count weights and memory of the real sizes.

Each entry: where the numbers stand, as `docs/families.md` says it, the family, the number of parameters in billions, as
published, the denoiser's config where it differs from the defaults of its class, that of the autoencoder, and that of
the scheduler where it is not just one of flow matching.
"""

from __future__ import annotations

from typing import Any

KL8 = {
    "block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
KL16 = {**KL8, "latent_channels": 16}

KL32 = {**KL8, "latent_channels": 32}
KL_COGVIEW = {**KL16, "block_out_channels": [128, 512, 1024, 1024]}

SANA = {
    "in_channels": 32, "out_channels": 32, "attention_head_dim": 32, "caption_channels": 2304, "mlp_ratio": 2.5,
    "attention_bias": False, "sample_size": 32, "patch_size": 1, "norm_elementwise_affine": False, "norm_eps": 1e-6,
    "interpolation_scale": None,
}  # fmt: skip
SANA_LARGE = {
    **SANA, "num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SD = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}  # fmt: skip
SD3 = {
    "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096, "patch_size": 2,
    "pooled_projection_dim": 2048, "sample_size": 128,
}  # fmt: skip
FLUX = {
    "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
DEEP = {"latent_channels": 32, "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}

PUBLISHED: dict[str, dict[str, Any]] = {
    # configs/stable-diffusion/v1-inference.yaml of https://github.com/CompVis/stable-diffusion: the defaults of the
    # class but for these
    "sd1x": {
        "source": "https://github.com/CompVis/stable-diffusion, v1-inference.yaml",
        "family": "sd1x", "billions": 0.8595, "vae": KL8, "scheduler": SD,
        "denoiser": {"in_channels": 4, "cross_attention_dim": 768},
    },
    # configs/stable-diffusion/v2-inference-v.yaml of https://github.com/Stability-AI/stablediffusion
    "sd2x": {
        "source": "https://github.com/Stability-AI/stablediffusion, v2-inference-v.yaml",
        "family": "sd2x", "billions": 0.8659, "vae": KL8, "scheduler": {**SD, "prediction_type": "v_prediction"},
        "denoiser": {
            "in_channels": 4, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    },
    # configs/inference/sd_xl_base.yaml of https://github.com/Stability-AI/generative-models; size: arXiv 2307.01952
    # (2.6B)
    "sdxl": {
        "source": "https://github.com/Stability-AI/generative-models, sd_xl_base.yaml",
        "family": "sdxl", "billions": 2.567, "vae": KL8, "scheduler": SD,
        "denoiser": {
            "in_channels": 4, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
        },
    },
    # scripts/convert_sd3_to_diffusers.py of https://github.com/huggingface/diffusers, on the weights of
    # https://github.com/Stability-AI/sd3.5; sizes: arXiv 2403.03206 (2B) and the models' cards (2.5B, 8.1B)
    "sd3-medium": {
        "source": "diffusers, convert_sd3_to_diffusers.py; arXiv 2403.03206",
        "family": "sd3", "billions": 2.08, "vae": KL16,
        "denoiser": {
            **SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    },
    "sd3.5-medium": {
        "source": "diffusers, convert_sd3_to_diffusers.py; https://github.com/Stability-AI/sd3.5",
        "family": "sd3", "billions": 2.47, "vae": KL16,
        "denoiser": {
            **SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13)),
        },
    },
    "sd3.5-large": {
        "source": "diffusers, convert_sd3_to_diffusers.py; https://github.com/Stability-AI/sd3.5",
        "family": "sd3", "billions": 8.06, "vae": KL16,
        "denoiser": {
            **SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
            "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
    },
    # src/flux/util.py of https://github.com/black-forest-labs/flux
    "flux-dev": {
        "source": "https://github.com/black-forest-labs/flux, util.py",
        "family": "flux", "billions": 11.9, "vae": KL16, "denoiser": {**FLUX, "guidance_embeds": True},
    },
    "flux-schnell": {
        "source": "https://github.com/black-forest-labs/flux, util.py",
        "family": "flux", "billions": 11.9, "vae": KL16, "denoiser": {**FLUX, "guidance_embeds": False},
    },
    # Qwen-Image and 2.1: defaults of the classes in diffusers, which are the published models'
    # (transformer_qwenimage.py, transformer_qwenimage21.py, autoencoder_kl_qwenimage*.py), and for Qwen-Image-2512 all
    # that its configs say; sizes: arXiv 2508.02324 (20B) and https://huggingface.co/Qwen/Qwen-Image-2.1 (7B)
    "qwen-image": {
        "source": "diffusers, defaults of QwenImageTransformer2DModel; arXiv 2508.02324",
        "family": "qwen-image",
        "billions": 20.4,
        "vae": {"z_dim": 16, "temperal_downsample": [False, True, True]},
        "denoiser": {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False,
            "axes_dims_rope": [16, 56, 56],
        },
    },
    "qwen-image-2": {
        "source": "diffusers, defaults of QwenImage21Transformer2DModel",
        "family": "qwen-image-2",
        "billions": 7.1,
        "vae": {"z_dim": 64, "temperal_downsample": [False, True, True, True]},
        "denoiser": {
            "patch_size": 1, "in_channels": 64, "out_channels": 64, "num_layers": 32, "attention_head_dim": 128,
            "num_attention_heads": 32, "context_in_dim": 4096, "mlp_ratio": 3, "axes_dims_rope": [16, 56, 56],
            "eps": 1e-6, "causal_condition": True,
        },
    },
    # scripts/convert_sana_to_diffusers.py of https://github.com/huggingface/diffusers; sizes: arXiv 2410.10629 (590M
    # and 1604M) and arXiv 2501.18427 (4.8B, of which the transformer has 4.72B)
    "sana-0.6b": {
        "source": "diffusers, convert_sana_to_diffusers.py; arXiv 2410.10629",
        "family": "sana",
        "billions": 0.59,
        "vae": DEEP,
        "denoiser": {
            **SANA, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152, "num_layers": 28,
        },
    },
    "sana-1.6b": {
        "source": "diffusers, convert_sana_to_diffusers.py; arXiv 2410.10629",
        "family": "sana", "billions": 1.604, "vae": DEEP, "denoiser": {**SANA_LARGE, "num_layers": 20}
    },
    "sana-1.5-1.6b": {
        "source": "diffusers, convert_sana_to_diffusers.py; arXiv 2501.18427",
        "family": "sana", "billions": 1.604, "vae": DEEP,
        "denoiser": {**SANA_LARGE, "num_layers": 20, "qk_norm": "rms_norm_across_heads"},
    },
    "sana-1.5-4.8b": {
        "source": "diffusers, convert_sana_to_diffusers.py; arXiv 2501.18427",
        "family": "sana",
        "billions": 4.72,
        "vae": DEEP,
        "denoiser": {**SANA_LARGE, "num_layers": 60, "qk_norm": "rms_norm_across_heads"},
    },
    # Tongyi-MAI/Z-Image-Turbo and Z-Image, transformer/config.json, as several ports quote it: the defaults of its
    # class in diffusers but for the positions; size: arXiv 2511.22699 (6B), 24.62 GB in fp32
    "z-image": {
        "source": "diffusers, defaults of ZImageTransformer2DModel; arXiv 2511.22699",
        "family": "z-image",
        "billions": 6.155,
        "vae": KL16,
        "denoiser": {"cap_feat_dim": 2560, "axes_lens": [1536, 512, 512]},
    },
    # https://github.com/black-forest-labs/flux2/blob/main/src/flux2/model.py: Flux2Params, Klein9BParams,
    # Klein4BParams, and scripts/convert_flux2_to_diffusers.py of diffusers; dev's config has no guidance_embeds
    "flux2-dev": {
        "source": "https://github.com/black-forest-labs/flux2, model.py",
        "family": "flux2-dev",
        "billions": 32.0,
        "vae": KL32,
        "denoiser": {
            "in_channels": 128, "joint_attention_dim": 15360, "num_attention_heads": 48, "num_layers": 8,
            "num_single_layers": 48, "guidance_embeds": True,
        },
    },
    "flux2-klein-9b": {
        "source": "https://github.com/black-forest-labs/flux2, model.py",
        "family": "flux2",
        "billions": 9.0,
        "vae": KL32,
        "denoiser": {
            "in_channels": 128, "joint_attention_dim": 12288, "num_attention_heads": 32, "num_layers": 8,
            "num_single_layers": 24, "guidance_embeds": False,
        },
    },
    "flux2-klein-4b": {
        "source": "https://github.com/black-forest-labs/flux2, model.py",
        "family": "flux2",
        "billions": 3.88,  # 7.75 GB in bf16
        "vae": KL32,
        "denoiser": {
            "in_channels": 128, "joint_attention_dim": 7680, "num_attention_heads": 24, "num_layers": 5,
            "num_single_layers": 20, "guidance_embeds": False,
        },
    },
    # https://github.com/vladmandic/sdnext, configs/chroma, a copy of the model's configs: 19 and 38 blocks, as the
    # defaults of its class; 17.8 GB in bf16
    "chroma": {
        "source": "diffusers, defaults of its class; https://github.com/vladmandic/sdnext has a copy",
        "family": "chroma",
        "billions": 8.9,
        "vae": KL16,
        "denoiser": {"in_channels": 64},
    },
    # conversion and tests of https://github.com/huggingface/diffusers; v0.3 has 9216 positions (the defaults of a
    # trainer for it)
    "auraflow": {
        "source": "diffusers, its conversion; 9,216 positions as v0.3",
        "family": "auraflow",
        "billions": 6.8,
        "vae": KL8,
        "denoiser": {
            "in_channels": 4, "num_mmdit_layers": 4, "num_single_dit_layers": 32, "attention_head_dim": 256,
            "num_attention_heads": 12, "joint_attention_dim": 2048, "caption_projection_dim": 3072,
            "pos_embed_max_size": 9216,
        },
    },
    # Alpha-VLLM/Lumina-Image-2.0, transformer/config.json, as sglang's test of its loader quotes it whole
    "lumina2": {
        "source": "the tests of https://github.com/sgl-project/sglang quote it",
        "family": "lumina2",
        "billions": 2.6,
        "vae": KL16,
        "denoiser": {
            "in_channels": 16, "hidden_size": 2304, "num_layers": 26, "num_refiner_layers": 2,
            "num_attention_heads": 24, "num_kv_heads": 8, "multiple_of": 256, "axes_dim_rope": [32, 32, 32],
            "axes_lens": [300, 512, 512], "cap_feat_dim": 2304, "norm_eps": 1e-5,
        },
    },
    # scripts/convert_pixart_sigma_to_diffusers.py of https://github.com/huggingface/diffusers
    "pixart-sigma": {
        "source": "diffusers, convert_pixart_sigma_to_diffusers.py",
        "family": "pixart-sigma",
        "billions": 0.61,
        "vae": KL8,
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.0001, "beta_end": 0.02,
            "beta_schedule": "linear", "num_train_timesteps": 1000,
        },
        "denoiser": {
            "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
            "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 128, "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
    },
    # https://huggingface.co/Kwai-Kolors/Kolors-diffusers/blob/main/unet/config.json
    "kolors": {
        "source": "https://huggingface.co/Kwai-Kolors/Kolors-diffusers, unet/config.json",
        "family": "kolors",
        "billions": 2.58,
        "vae": KL8,
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.014,
            "beta_schedule": "scaled_linear", "num_train_timesteps": 1100, "prediction_type": "epsilon",
            "steps_offset": 1, "timestep_spacing": "leading",
        },
        "denoiser": {
            "in_channels": 4,
            "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "attention_head_dim": [5, 10, 20],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 5632, "encoder_hid_dim": 4096,
            "encoder_hid_dim_type": "text_proj", "sample_size": 128,
        },
    },
    # scripts/convert_cogview4_to_diffusers.py of https://github.com/huggingface/diffusers: transformer, autoencoder and
    # scheduler
    "cogview4": {
        "source": "diffusers, convert_cogview4_to_diffusers.py",
        "family": "cogview4",
        "billions": 6.37,
        "vae": KL_COGVIEW,
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
