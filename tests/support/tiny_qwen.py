"""Random tiny Qwen-Images: every part of the real architectures, the text encoder's vision tower included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_llm import write_llm_tokenizer
from support.tiny_parts import CHANNELS, Tiny, seeded

WIDTH = 32
"""Of the language model's states."""
LENGTH = 224
"""Tokens that the network sees of a prompt: a token per letter, and most of the system's words."""
STATISTICS: dict[str, Any] = {
    "latents_mean": [0.1 * number for number in range(CHANNELS)],
    "latents_std": [0.8 + 0.05 * number for number in range(CHANNELS)],
}
SHIFTED: dict[str, Any] = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 16,
    "max_image_seq_len": 512, "shift_terminal": 0.02,
}  # fmt: skip
"""As the published schedulers, for smaller images."""
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
          "patch_size": 4}  # fmt: skip


def text_settings(section: list[int]) -> dict[str, Any]:
    """The language model's part of a config; `section` are the frequencies of its axes."""
    return {
        "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": WIDTH // 2, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip


def reader(kind: str, **config: Any) -> Any:
    """A random vision-language model of a class of transformers whose tokens differ."""
    import torch
    import transformers

    model: Any = getattr(transformers, kind)
    settings = model.config_class(**config, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    encoder = seeded(lambda: model(settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoder


def write_tiny_qwen_image(folder: Path) -> Path:
    """A random tiny Qwen-Image."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    vae = {"base_dim": 8, "z_dim": CHANNELS, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    transformer: dict[str, Any] = {
        "in_channels": 4 * CHANNELS, "out_channels": CHANNELS, "num_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    vision = {**VISION, "fullatt_block_indexes": [0], "window_size": 8}
    QwenImagePipeline(
        transformer=seeded(lambda: QwenImageTransformer2DModel(**transformer)),
        vae=seeded(lambda: AutoencoderKLQwenImage(**vae, **STATISTICS)),
        text_encoder=reader(
            "Qwen2_5_VLForConditionalGeneration", text_config=text_settings([2, 3, 3]), vision_config=vision
        ),
        tokenizer=write_llm_tokenizer(folder / "tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTED),
    ).save_pretrained(folder)
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states, padded to the full length, and their mask."""
    import torch

    states, mask = pipeline.encode_prompt(list(prompts), device="cpu")[:2]
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    more = LENGTH - states.shape[1]
    pad = torch.nn.functional.pad
    return {"prompt_embeds": pad(states, (0, 0, 0, more)), "prompt_embeds_mask": pad(mask, (0, more))}


def frame_latents(vae: Any, pixels: Any) -> tuple[Any, Any, Any]:
    """See :func:`.tiny_parts.plain_latents`; images are videos of one frame."""
    import torch

    mean, std = (torch.tensor(STATISTICS[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    posterior = vae.encode(pixels.unsqueeze(2)).latent_dist
    mode, sample = posterior.mode(), posterior.sample(generator=torch.Generator().manual_seed(5))
    decoded = vae.decode(mode).sample
    return ((mode - mean) / std).squeeze(2), ((sample - mean) / std).squeeze(2), decoded.squeeze(2)


QWEN_IMAGE = Tiny(
    "qwen-image",
    write_tiny_qwen_image,
    settings={"max_sequence_length": LENGTH},
    guided={"true_cfg_scale": 4.0, "negative_prompt": ["", ""]},
    unguided={"true_cfg_scale": 1.0},
    scale_key="true_cfg_scale",
    halves="in turn",
    encoded=encoded,
    autoencoded=frame_latents,
)
