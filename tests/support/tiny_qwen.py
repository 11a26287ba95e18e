"""Random tiny Qwen-Images: every part of the real architectures, the text encoder's vision tower included."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from support.tiny_llm import write_llm_tokenizer
from support.tiny_parts import CHANNELS, Tiny, last, on_white, seeded
from support.tiny_sdxl import EDGE, SCALE_FACTOR

WIDTH = 32
"""Of the language model's states."""
LENGTH = 224
"""Tokens that the network sees of a prompt: a token per letter, and most of the system's words."""
SHORTER = 96
"""The same for the shorter words of the second generation."""
STATISTICS: dict[str, Any] = {
    "latents_mean": [0.1 * number for number in range(CHANNELS)],
    "latents_std": [0.8 + 0.05 * number for number in range(CHANNELS)],
}
SHIFTED: dict[str, Any] = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 16,
    "max_image_seq_len": 512, "shift_terminal": 0.02,
}  # fmt: skip
"""As the published schedulers, for smaller images."""
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}{{ part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
"""A conversation in the shape of Qwen3-VL's template."""
SIDE = EDGE // SCALE_FACTOR
"""Latents along an edge."""
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


def write_tiny_qwen_image_2(folder: Path, *, levels: int = 2) -> Path:
    """A random tiny Qwen-Image 2.1; with five levels its autoencoder compresses as the published one."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )

    vae: dict[str, Any] = {
        "base_dim": 8, "decoder_base_dim": 12, "z_dim": CHANNELS, "dim_mult": [2] * levels, "num_res_blocks": 1,
        "temperal_downsample": [False] * (levels - 1), "scale_factor_spatial": SCALE_FACTOR ** (levels - 1),
    }  # fmt: skip
    transformer: dict[str, Any] = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "context_in_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    vision = {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = text_settings([2, 3, 3])
    QwenImage21Pipeline(
        transformer=seeded(lambda: QwenImage21Transformer2DModel(**transformer)),
        vae=seeded(lambda: AutoencoderKLQwenImage21(**vae, **STATISTICS)),
        text_encoder=reader("Qwen3VLForConditionalGeneration", text_config=text, vision_config=vision),
        processor=processor(write_llm_tokenizer(folder / "tokenizer", special=("<|image_pad|>",))),
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTED),
    ).save_pretrained(folder)
    return folder


def processor(tokenizer: Any) -> Any:
    """Qwen3-VL's processor; where torchvision is missing, one of text alone stands in for it, in its name."""
    import transformers
    from transformers import ProcessorMixin

    if find_spec("torchvision") is not None:
        images, videos = transformers.Qwen2VLImageProcessor(), transformers.Qwen3VLVideoProcessor()
        return transformers.Qwen3VLProcessor(images, tokenizer, videos, chat_template=TURNS)

    class Qwen3VLProcessor(ProcessorMixin):
        def __init__(self, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(tokenizer, chat_template=chat_template)

        def __call__(self, images: Any = None, text: Any = None, **arguments: Any) -> Any:
            return super().__call__(text=[text] if isinstance(text, str) else text, **arguments)

    Qwen3VLProcessor.__module__ = "transformers.models.qwen3_vl.processing_qwen3_vl"
    transformers.Qwen3VLProcessor = Qwen3VLProcessor  # type: ignore[misc]
    return Qwen3VLProcessor(tokenizer, chat_template=TURNS)


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states, padded to the full length, and their mask."""
    import torch

    states, mask = pipeline.encode_prompt(list(prompts), device="cpu")[:2]
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return padded(states, mask, length=LENGTH)


def encoded_alone(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The same of the second generation, each prompt in a call of its own."""
    import torch

    rows = [pipeline.encode_prompt([prompt], device="cpu")[0] for prompt in prompts]
    each = [padded(states, torch.ones(states.shape[:2], dtype=torch.bool), length=SHORTER) for states in rows]
    return {key: torch.cat([one[key] for one in each]) for key in each[0]}


def padded(states: Any, mask: Any, *, length: int) -> dict[str, Any]:
    """States (B, T, D) and mask (B, T) with as many positions as `length`."""
    import torch

    more = length - states.shape[1]
    pad = torch.nn.functional.pad
    return {"prompt_embeds": pad(states, (0, 0, 0, more)), "prompt_embeds_mask": pad(mask, (0, more))}


def frame_latents(vae: Any, pixels: Any) -> tuple[Any, Any, Any]:
    """See :func:`.tiny_parts.plain_latents`; images are videos of one frame."""
    import torch

    mean, std = (torch.tensor(STATISTICS[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    opaque = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1) if "in_channels" in vae.config else pixels
    posterior = vae.encode(opaque.unsqueeze(2)).latent_dist
    mode, sample = posterior.mode(), posterior.sample(generator=torch.Generator().manual_seed(5))
    decoded = on_white((vae.decode(mode).sample.squeeze(2) + 1) / 2) * 2 - 1
    return ((mode - mean) / std).squeeze(2), ((sample - mean) / std).squeeze(2), decoded


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
QWEN_IMAGE_2 = Tiny(
    "qwen-image-2",
    write_tiny_qwen_image_2,
    settings={"max_sequence_length": SHORTER},
    guided={"true_cfg_scale": 4.0, "negative_prompt": ["", ""]},
    unguided={"true_cfg_scale": 1.0},
    scale_key="true_cfg_scale",
    written=lambda output: output[:, -SIDE * SIDE :],
    halves="in turn",
    alone=True,
    states=last,
    encoded=encoded_alone,
    autoencoded=frame_latents,
)
