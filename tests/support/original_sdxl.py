"""Writes a Stable Diffusion (XL, or before) as one file in the original layout, as published checkpoints have it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    "final_layer_norm.": "ln_final.",
}


def write_single_file(folder: Path, path: Path, *, markers: tuple[str, ...] = ()) -> Path:
    """The model in `folder` as one safetensors file; `markers` are empty tensors as ``v_pred``."""
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    blocks = len(pipeline.unet.config.block_out_channels)
    layers = pipeline.unet.config.layers_per_block
    levels = len(pipeline.vae.config.block_out_channels)
    parts = {
        "model.diffusion_model.": {unet_key(k, layers, blocks): v for k, v in pipeline.unet.state_dict().items()},
        "first_stage_model.": {vae_key(k, levels): v for k, v in pipeline.vae.state_dict().items()},
        **text_parts(pipeline),
    }
    state = {prefix + key: value.contiguous() for prefix, part in parts.items() for key, value in part.items()}
    for key, value in state.items():
        if re.search(r"first_stage_model\..*attn_1\.(q|k|v|proj_out)\.weight", key):
            state[key] = value[:, :, None, None].contiguous()
    save_file({**state, **{marker: torch.zeros(0) for marker in markers}}, path)
    return path


def text_parts(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """Prefix -> tensors of each text encoder."""
    state = pipeline.text_encoder.state_dict()
    first = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
    if hasattr(pipeline, "text_encoder_2"):
        second = open_clip(pipeline.text_encoder_2.state_dict())
        return {"conditioner.embedders.0.transformer.": first, "conditioner.embedders.1.model.": second}
    if pipeline.unet.config.use_linear_projection:
        return {"cond_stage_model.model.": open_clip(state)}
    return {"cond_stage_model.transformer.": first}


def unet_key(key: str, layers: int, blocks: int) -> str:
    """``down_blocks.1.resnets.0.conv1.weight`` -> ``input_blocks.4.0.in_layers.2.weight`` and so on."""
    for ours, theirs in ENDS.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    kind, rest = key.split(".", 1)
    if kind == "mid_block":
        part, index, rest = rest.split(".", 2)
        place = 1 if part == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{resnet(rest) if part == 'resnets' else rest}"
    level, part, index, rest = rest.split(".", 3)
    size = layers + 1
    if kind == "down_blocks":
        if part == "downsamplers":
            return f"input_blocks.{size * (int(level) + 1)}.0.op.{rest.removeprefix('conv.')}"
        stem = f"input_blocks.{size * int(level) + int(index) + 1}"
    else:
        stem = f"output_blocks.{size * int(level) + int(index)}"
        if part == "upsamplers":
            has_attention = int(level) < blocks - 1
            return f"output_blocks.{size * int(level) + layers}.{2 if has_attention else 1}.{rest}"
    return f"{stem}.0.{resnet(rest)}" if part == "resnets" else f"{stem}.1.{rest}"


def resnet(rest: str) -> str:
    for ours, theirs in RESNET.items():
        if rest.startswith(ours):
            return theirs + rest.removeprefix(ours)
    raise KeyError(rest)


def vae_key(key: str, levels: int) -> str:
    """``decoder.up_blocks.0.resnets.1.conv_shortcut.weight`` -> ``decoder.up.1.block.1.nin_shortcut.weight``."""
    key = key.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    attention = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
    if "mid_block.attentions.0." in key:
        for ours, theirs in attention.items():
            key = key.replace(f"mid_block.attentions.0.{ours}", f"mid.attn_1.{theirs}")
    return key


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names: the three projections of an attention in one tensor, the text projection transposed."""
    import torch

    projection = state.get("text_projection.weight")
    result: dict[str, Tensor] = {} if projection is None else {"text_projection": projection.T}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        if name.startswith(("text_projection", "embeddings.position_ids")) or re.search(r"self_attn\.[kv]_proj", name):
            continue
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if match := re.search(r"self_attn\.q_proj\.(weight|bias)", name):
            value = torch.cat([state[key.replace("q_proj", f"{which}_proj")] for which in "qkv"])
            name = name.replace(match[0], f"attn.in_proj_{match[1]}")
        result[name] = value
    return result
