"""What papers and their authors' code train the methods with.

Read in the repositories and files named as sources. Where the authors published no training code (TCD, Hyper-SD,
SDXL-Lightning) or none for text to image (mean flows, progressive and guidance distillation), nothing is recommended.
"""

from __future__ import annotations

from ..core.plugin_api.recommended import Recommended

_UNETS = ("sdxl", "sd1x", "sd2x")
_HALF = Recommended("the same scripts, on a GPU", run={"mixed_precision": "fp16"}, families=_UNETS)

LCM = (
    Recommended(
        "huggingface/diffusers, consistency_distillation/README_sdxl.md: LCM-LoRA",
        run={"learning_rate": 1e-4, "lora_rank": 64, "lora_alpha": 64, "adam_weight_decay": 0.0},
        method={"loss_type": "huber"},
        batch=12,
        model_type="lora",
    ),
    Recommended(
        "huggingface/diffusers, consistency_distillation/README_sdxl.md: full model",
        run={"learning_rate": 1e-6, "adam_weight_decay": 0.0},
        method={"loss_type": "huber"},
        batch=12,
        model_type="full",
    ),
    _HALF,
)

PCM = (
    Recommended(
        "G-U-N/Phased-Consistency-Model, text_to_image_sdxl/train_pcm_lora_sdxl.sh",
        run={"learning_rate": 2e-6, "lora_rank": 64, "lora_alpha": 8, "adam_weight_decay": 0.0},
        batch=10,
        model_type="lora",
    ),
    Recommended(
        "text_to_image_sd15/train_pcm_lora_sd15.sh",
        run={"learning_rate": 5e-6, "adam_weight_decay": 1e-3},
        method={"num_ddim_timesteps": 50, "w_min": 5.0, "w_max": 6.0},
        batch=20,
        model_type="lora",
        families=("sd1x", "sd2x"),
    ),
    Recommended(
        "text_to_image_sd3/run.sh",
        run={"learning_rate": 5e-6, "lora_rank": 32, "adam_weight_decay": 1e-3},
        method={"num_ddim_timesteps": 100, "w_min": 5.0, "w_max": 6.0},
        batch=2,
        model_type="lora",
        families=("sd3",),
    ),
    _HALF,
)

_SCRIPT = {"max_grad_norm": 10.0, "lr_warmup_steps": 500}
DMD2 = (
    Recommended(
        "tianweiy/DMD2, experiments/sdxl/..._denoising4step_..._lora.sh and main/train_sd.py",
        run={"learning_rate": 5e-5, "lora_rank": 64, "lora_alpha": 8, **_SCRIPT},
        batch=128,
        told={"gan_weight": 5e-3, "fake_score": "full"},
        model_type="lora",
    ),
    Recommended(
        "tianweiy/DMD2, experiments/sdxl/..._lr5e-7_denoising4step_...sh and main/train_sd.py",
        run={"learning_rate": 5e-7, **_SCRIPT},
        batch=128,
        told={"gan_weight": 5e-3},
        model_type="full",
    ),
    Recommended(
        "tianweiy/DMD2, experiments/sdv1.5/..._guidance1.75_lr5e-7_..._gan1e-3_...sh",
        run={"learning_rate": 5e-7, **_SCRIPT},
        method={"guidance_scale": 1.75, "fake_updates_per_student_update": 10},
        batch=2048,
        told={"gan_weight": 1e-3},
        model_type="full",
        families=("sd1x",),
    ),
)

KD = (
    Recommended(
        "tianweiy/DMD2, experiments/sdxl/sdxl_lr1e-5_8node_ode_pretraining_10k_cond399.sh and main/train_sd_ode.py",
        run={"learning_rate": 1e-5, "lr_warmup_steps": 500, "max_grad_norm": 0.0},
        batch=256,
        model_type="full",
    ),
)
