"""Random tiny models of pipelines that have no family here, and their descriptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.tiny_llm import START, llm, llm_settings, with_wide_embeddings, write_llm_tokenizer
from support.tiny_parts import CHANNELS, flow_vae, seeded

WIDTH, SQUARE = 32, 16
"""Of the language models' states; Gemma multiplies by the root, a buffer that no cast makes exact."""
OVIS: dict[str, Any] = {
    "denoiser_call": {
        "hidden_states": "latents", "encoder_hidden_states": "prompt_embeds", "timestep": "time",
        "img_ids": "image_ids", "txt_ids": "counted_text_ids",
    },
    "time_input": "fraction", "packing": "patches", "embeddings": ["prompt_embeds"],
    "encode_call": {"max_sequence_length": 200},
}  # fmt: skip
PRX: dict[str, Any] = {
    "denoiser_call": {
        "hidden_states": "latents", "timestep": "time", "encoder_hidden_states": "prompt_embeds",
        "attention_mask": "prompt_attention_mask",
    },
    "time_input": "fraction", "embeddings": ["prompt_embeds", "prompt_attention_mask"],
    "encode_call": {"tokenizer_max_length": 32}, "pipeline_call": {"use_resolution_binning": False},
    "latents_at_once": 1,  # its pipeline guides one image at a time
}  # fmt: skip


def write_tiny_ovis(folder: Path) -> Path:
    """Ovis-Image: FLUX.1's blocks, Qwen3, counted ids of the text, a system prompt."""
    from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": 4 * CHANNELS, "out_channels": 4 * CHANNELS, "num_layers": 1, "num_single_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    OvisImagePipeline(
        transformer=seeded(lambda: OvisImageTransformer2DModel(**config)),
        vae=flow_vae(),
        text_encoder=llm("Qwen3Model", WIDTH),
        tokenizer=write_llm_tokenizer(folder / "tokenizer"),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_shift=2.0
        ),
    ).save_pretrained(folder)
    return folder


def write_tiny_prx(folder: Path) -> Path:
    """PRX: text beside each block's image, a mask, fused projections; the encoder of T5Gemma, filed as published with
    the config of the whole.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    config: dict[str, Any] = {
        "in_channels": CHANNELS, "patch_size": 2, "context_in_dim": SQUARE, "hidden_size": 32, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 2, "axes_dim": [8, 8],
    }  # fmt: skip
    half = T5GemmaModuleConfig(**llm_settings(SQUARE))
    whole = T5GemmaConfig(encoder=half, decoder=half)
    PRXPipeline(
        transformer=seeded(lambda: PRXTransformer2DModel(**config)),
        vae=flow_vae(),
        text_encoder=with_wide_embeddings(seeded(lambda: T5GemmaEncoder(whole.encoder))),
        tokenizer=write_llm_tokenizer(folder / "tokenizer", begin=(START,)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    whole.save_pretrained(folder / "text_encoder")
    return folder


UNDESCRIBED: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "OvisImagePipeline": (write_tiny_ovis, OVIS),
    "PRXPipeline": (write_tiny_prx, PRX),
}
"""Pipelines without a family here, chosen after `generic` was written -> how a model is written, its description."""
