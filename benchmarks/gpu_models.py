"""The models of the GPU benchmark: published sizes with random weights, and the same architectures small.

The denoisers and autoencoders are of the published sizes. Text encoders have one layer of the published width: a run
encodes its prompts once, before the first step, and what a step takes is as wide and as long as the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent.parent / "model_families" / "assets"
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        family: Name of the family.
        network: Class of the denoiser in diffusers.
        config: Its published config.
        small: What is another for the small network.
        widths: Of the text encoders, T5's last.
        small_widths: The same of the small one.
        channels: Of the latents.
        vae: Published settings of the autoencoder beside its usual ones.
        tokens: Length of an encoded prompt as the denoiser takes it.
        guided_by_input: Whether guidance is an input, so that one call takes the place of two.
        source: Where the config is published.
    """

    family: str
    network: str
    config: Mapping[str, Any]
    small: Mapping[str, Any]
    widths: tuple[int, ...]
    small_widths: tuple[int, ...]
    channels: int
    vae: Mapping[str, Any]
    tokens: int
    guided_by_input: bool
    source: str


MODELS = {
    "SDXL": Published(
        "sdxl",
        "UNet2DConditionModel",
        {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
            "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            "block_out_channels": (32, 32, 64), "layers_per_block": 1, "cross_attention_dim": 64,
            "transformer_layers_per_block": (1, 1, 1), "attention_head_dim": (2, 2, 4), "norm_num_groups": 16,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        (768, 1280), (32, 32), 4, {"scaling_factor": 0.13025, "force_upcast": True}, 77, False,
        "stabilityai/stable-diffusion-xl-base-1.0, unet/config.json",
    ),
    "SD3.5-medium": Published(
        "sd3",
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        {
            "sample_size": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 80, "caption_projection_dim": 32, "pooled_projection_dim": 64,
            "pos_embed_max_size": 16, "dual_attention_layers": (0, 1),
        },
        (768, 1280, 4096), (32, 32, 80), 16,
        {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
        77 + 256, False,
        "stabilityai/stable-diffusion-3.5-medium, transformer/config.json",
    ),
    "FLUX.1": Published(
        "flux",
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        {
            "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 80, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
        },
        (768, 4096), (32, 80), 16,
        {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
        512, True,
        "black-forest-labs/FLUX.1-dev, transformer/config.json",
    ),
}  # fmt: skip
"""Name -> model."""


def denoiser_config(model: Published, *, small: bool) -> dict[str, Any]:
    """Return the config of the denoiser, or of the small one."""
    return {**model.config, **(model.small if small else {})}


def write_pipeline(model: Published, folder: Path, *, small: bool, device: str) -> None:
    """Write a pipeline with random weights, in bfloat16 (the small one in float32).

    Args:
        model: Which one.
        folder: Where it goes, in diffusers layout.
        small: Write the small one.
        device: Device that draws the weights.
    """
    import diffusers
    import torch

    torch.manual_seed(0)
    dtype = torch.float32 if small else torch.bfloat16
    vae = {
        "block_out_channels": (8,) * 4 if small else (128, 256, 512, 512), "layers_per_block": 1 if small else 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4 if small else 32, "latent_channels": model.channels, **model.vae,
    }  # fmt: skip
    with torch.device(device):
        denoiser = getattr(diffusers, model.network)(**denoiser_config(model, small=small)).to(dtype)
        autoencoder = diffusers.AutoencoderKL(**vae).to(dtype)
    parts = {"vae": autoencoder, **_encoders(model, small=small, dtype=dtype, device=device)}
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if model.family == "sdxl":
        scheduler = diffusers.EulerDiscreteScheduler(**noise, timestep_spacing="leading")
        diffusers.StableDiffusionXLPipeline(
            unet=denoiser, scheduler=scheduler, add_watermarker=False, **parts
        ).save_pretrained(folder)
        return
    kind = {"sd3": diffusers.StableDiffusion3Pipeline, "flux": diffusers.FluxPipeline}[model.family]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kind(transformer=denoiser, scheduler=scheduler, **parts).save_pretrained(folder)


def _encoders(model: Published, *, small: bool, dtype: Any, device: str) -> dict[str, Any]:
    """Return tokenizers and text encoders by their names in the pipeline."""
    import torch
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

    widths, found = model.small_widths if small else model.widths, {}
    miniature = ASSETS / ("sdxl_scenes" if model.family == "sdxl" else "sd3_miniature")
    for number, width in enumerate(widths, 1):
        ending = "" if number == 1 else f"_{number}"
        t5 = model.family != "sdxl" and number == len(widths)
        tokenizer = AutoTokenizer.from_pretrained(miniature / ("tokenizer_3" if t5 else f"tokenizer{ending}"))
        if not t5:
            tokenizer.model_max_length = CLIP_TOKENS
        projects = not t5 and (model.family == "sd3" or (model.family == "sdxl" and number == 2))
        kind = T5EncoderModel if t5 else CLIPTextModelWithProjection if projects else CLIPTextModel
        config = _t5_config(width, len(tokenizer)) if t5 else _clip_config(width, tokenizer)
        with torch.device(device):
            found[f"text_encoder{ending}"] = kind(config).to(dtype)
        found[f"tokenizer{ending}"] = tokenizer
    return found


def _t5_config(width: int, vocabulary: int) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=16, d_ff=width, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip


def _clip_config(width: int, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, projection_dim=width, intermediate_size=width,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
