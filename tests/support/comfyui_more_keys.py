"""The rest of :mod:`.comfyui_keys`: networks whose layers have names near diffusers'. The sources are named there."""

from __future__ import annotations

from typing import Any

from support.comfyui_keys import Client, Rule, in_blocks, thirds

# -- AuraFlow: comfy/ldm/aura/mmdit.py, auraflow_to_diffusers ---------------------------------------------------------

_HEADS = ("q", "k", "v", "o")
AURAFLOW = Client(
    layers=(
        ("init_x_linear", "d", "latent"),
        ("cond_seq_linear", "d", "text"),
        ("t_embedder.mlp.0", "d", "256"),
        ("t_embedder.mlp.2", "d", "d"),
        ("final_linear", "latent", "d"),
        ("modF.1", "2 d", "d"),
        *((f"double_layers.{{i}}.attn.w{n}{head}", "d", "d") for n in (1, 2) for head in _HEADS),
        *((f"double_layers.{{i}}.mlp{part}.c_fc{n}", "f", "d") for part in "CX" for n in (1, 2)),
        *((f"double_layers.{{i}}.mlp{part}.c_proj", "d", "f") for part in "CX"),
        *((f"double_layers.{{i}}.mod{part}.1", "6 d", "d") for part in "CX"),
        *((f"single_layers.{{i}}.attn.w1{head}", "d", "d") for head in _HEADS),
        *((f"single_layers.{{i}}.mlp.c_fc{n}", "f", "d") for n in (1, 2)),
        ("single_layers.{i}.mlp.c_proj", "d", "f"),
        ("single_layers.{i}.modCX.1", "6 d", "d"),
    ),
    blocks={"double_layers": "depth", "single_layers": "singles"},
    diffusers={
        "pos_embed.proj": "init_x_linear",
        "context_embedder": "cond_seq_linear",
        "time_step_proj.linear_1": "t_embedder.mlp.0",
        "time_step_proj.linear_2": "t_embedder.mlp.2",
        "norm_out.linear": ("modF.1", "0", "halves"),
        "proj_out": "final_linear",
        **in_blocks("joint_transformer_blocks", "double_layers", {
            **{f"attn.to_{head}": f"attn.w2{head}" for head in "qkv"}, "attn.to_out.0": "attn.w2o",
            **{f"attn.add_{head}_proj": f"attn.w1{head}" for head in "qkv"}, "attn.to_add_out": "attn.w1o",
            **{f"{ours}.{layer}": f"{theirs}.{name}" for ours, theirs in (("ff", "mlpX"), ("ff_context", "mlpC"))
               for layer, name in (("linear_1", "c_fc1"), ("linear_2", "c_fc2"), ("out_projection", "c_proj"))},
            "norm1.linear": "modX.1", "norm1_context.linear": "modC.1",
        }),
        **in_blocks("single_transformer_blocks", "single_layers", {
            **{f"attn.to_{head}": f"attn.w1{head}" for head in "qkv"}, "attn.to_out.0": "attn.w1o",
            "ff.linear_1": "mlp.c_fc1", "ff.linear_2": "mlp.c_fc2", "ff.out_projection": "mlp.c_proj",
            "norm1.linear": "modCX.1",
        }),
    },
    dotted=("transformer.",),
)  # fmt: skip

# -- PixArt Sigma: comfy/ldm/pixart/pixartms.py, pixart_to_diffusers --------------------------------------------------

PIXART = Client(
    layers=(
        ("x_embedder.proj", "d", "latent"),
        ("t_block.1", "6 d", "d"),
        ("t_embedder.mlp.0", "d", "256"),
        ("t_embedder.mlp.2", "d", "d"),
        ("y_embedder.y_proj.fc1", "d", "text"),
        ("y_embedder.y_proj.fc2", "d", "d"),
        ("final_layer.linear", "2 latent", "d"),
        ("blocks.{i}.attn.qkv", "3 d", "d"),
        ("blocks.{i}.attn.proj", "d", "d"),
        ("blocks.{i}.cross_attn.q_linear", "d", "d"),
        ("blocks.{i}.cross_attn.kv_linear", "2 d", "d"),
        ("blocks.{i}.cross_attn.proj", "d", "d"),
        ("blocks.{i}.mlp.fc1", "4 d", "d"),
        ("blocks.{i}.mlp.fc2", "d", "4 d"),
    ),
    blocks={"blocks": "depth"},
    diffusers={
        "pos_embed.proj": "x_embedder.proj",
        "adaln_single.linear": "t_block.1",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "proj_out": "final_layer.linear",
        **in_blocks("transformer_blocks", "blocks", {
            **thirds("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")), "attn1.to_out.0": "attn.proj",
            "attn2.to_q": "cross_attn.q_linear", "attn2.to_out.0": "cross_attn.proj",
            "attn2.to_k": ("cross_attn.kv_linear", "0", "d"), "attn2.to_v": ("cross_attn.kv_linear", "d", "d"),
            "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
        }),
    },
    dotted=("transformer.", "base_model.model.", "unet.base_model.model."),
)  # fmt: skip

# -- Qwen-Image and Qwen-Image 2.1: comfy/ldm/qwen_image, comfy/ldm/qwen_image21, comfy/lora.py -----------------------


def _same(layers: tuple[Rule, ...], *, but: dict[str, Any] | None = None) -> dict[str, Any]:
    """The names of the original as diffusers' paths; `but` replaces a layer's by those of its parts."""
    but = but or {}
    kept = {path: path for path, *_ in layers if path not in {target for target, *_ in but.values()}}
    return {**kept, **but}


_QWEN_NAMES: dict[str, Any] = {"dotted": ("transformer.", ""), "flat": ("lycoris_",)}
_QWEN_LAYERS: tuple[Rule, ...] = (
    ("img_in", "d", "latent"),
    ("txt_in", "d", "text"),
    ("time_text_embed.timestep_embedder.linear_1", "d", "256"),
    ("time_text_embed.timestep_embedder.linear_2", "d", "d"),
    ("norm_out.linear", "2 d", "d"),
    ("proj_out", "latent", "d"),
    *((f"transformer_blocks.{{i}}.attn.{name}", "d", "d") for name in
      ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *((f"transformer_blocks.{{i}}.{stream}_mod.1", "6 d", "d") for stream in ("img", "txt")),
    *((f"transformer_blocks.{{i}}.{stream}_mlp.net.0.proj", "4 d", "d") for stream in ("img", "txt")),
    *((f"transformer_blocks.{{i}}.{stream}_mlp.net.2", "d", "4 d") for stream in ("img", "txt")),
)  # fmt: skip
QWEN_IMAGE = Client(
    layers=_QWEN_LAYERS, blocks={"transformer_blocks": "depth"}, diffusers=_same(_QWEN_LAYERS), **_QWEN_NAMES
)
_QWEN_21_LAYERS: tuple[Rule, ...] = (
    ("img_in", "d", "latent"),
    ("txt_in.in_layer", "d", "text"),
    ("txt_in.out_layer", "d", "d"),
    ("time_text_embed.timestep_embedder.linear_1", "d", "256"),
    ("time_text_embed.timestep_embedder.linear_2", "d", "d"),
    ("modulation.1", "4 d", "d"),
    ("norm_out.linear", "d", "d"),
    ("proj_out", "latent", "d"),
    *((f"transformer_blocks.{{i}}.attn.{name}", "d", "d") for name in ("to_q", "to_k", "to_v", "to_out.0")),
    ("transformer_blocks.{i}.img_mlp.gate_up", "6 d", "d"),
    ("transformer_blocks.{i}.img_mlp.out", "d", "3 d"),
)
_GATE_UP = "transformer_blocks.{i}.img_mlp.gate_up"
QWEN_IMAGE_21 = Client(
    layers=_QWEN_21_LAYERS,
    blocks={"transformer_blocks": "depth"},
    diffusers=_same(
        _QWEN_21_LAYERS,
        but={
            "transformer_blocks.{i}.img_mlp.gate_layer": (_GATE_UP, "0", "3 d"),
            "transformer_blocks.{i}.img_mlp.proj": (_GATE_UP, "3 d", "3 d"),
        },
    ),
    **_QWEN_NAMES,
)
