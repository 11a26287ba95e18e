"""ComfyUI's rules of names for LoRAs, as data: which layer of its networks a name in a file stands for.

Facts of https://github.com/comfyanonymous/ComfyUI (now Comfy-Org/ComfyUI): ``comfy/lora.py`` (model_lora_keys_unet) at
17358c8f73b581a0d22facc3c385822f09b8bfb1, ``comfy/utils.py`` (the functions ``*_to_diffusers``) at
09708eae709a992a5684bed3595ce4d07e705b4e, the networks of ``comfy/ldm`` at a125cd84b054a57729b5eecab930ca9408719832;
Qwen-Image 2.1's at 08f68f0919d24164469557ca198b8e725c4fd237, FLUX.2's and Z-Image's as ``comfy/model_detection.py`` at
0b61ce5baa9ea03d8484729b7eb00e77c6fca227 tells them from others.

Any layer may be named by its own path: ``lora_unet_`` and the path with underscores, or ``diffusion_model.`` and the
path with dots. A family's map adds names made of diffusers' paths. A name may stand for some rows of a layer, or for
its rows with the halves exchanged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ALL = "all"
Rule = tuple[str, str, str] | tuple[str, str, str, str]
"""Path of a layer (``{i}`` counts blocks), rows, columns, and in which of the blocks it is: all without."""


@dataclass(frozen=True)
class Place:
    """What a name stands for: `rows` rows of `layer` from `start` on, of (rows, columns) in all."""

    layer: str
    start: int
    rows: int
    shape: tuple[int, int]
    halves_exchanged: bool = False


@dataclass(frozen=True)
class Client:
    """ComfyUI's network of one family.

    Attributes:
        layers: Its layers.
        blocks: First part of a layer's path -> how many blocks there are, as a size.
        diffusers: diffusers' path -> layer, or (layer, first row, rows). ``halves`` for rows: all of them, the
            halves exchanged; ``halves of the last``: in the last block alone.
        dotted: What may stand before diffusers' path.
        flat: What may stand before diffusers' path with underscores for dots.
    """

    layers: tuple[Rule, ...]
    blocks: Mapping[str, str]
    diffusers: Mapping[str, str | tuple[str, str, str]] = field(default_factory=dict)
    dotted: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()

    def names(self, sizes: Mapping[str, Any]) -> dict[str, Place]:
        """Every name that the loader knows -> what it stands for."""
        own = dict(self._layers(sizes))
        found = {}
        for path, shape in own.items():
            place = Place(path, 0, shape[0], shape)
            found[f"lora_unet_{path.replace('.', '_')}"] = found[f"diffusion_model.{path}"] = place
        for path, place in self._mapped(sizes, own):
            found |= {f"{prefix}{path}": place for prefix in self.dotted}
            found |= {f"{prefix}{path.replace('.', '_')}": place for prefix in self.flat}
        return found

    def _layers(self, sizes: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
        for path, rows, columns, *which in self.layers:
            for i in self._indices(path, sizes):
                if i is None or WHICH[which[0] if which else ALL](i, sizes):
                    yield path.format(i=i), (size(rows, sizes), size(columns, sizes))

    def _indices(self, path: str, sizes: Mapping[str, Any]) -> list[int] | list[None]:
        return list(range(size(self.blocks[path.partition(".{i}")[0]], sizes))) if "{i}" in path else [None]

    def _mapped(self, sizes: Mapping[str, Any], own: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Place]]:
        for path, target in self.diffusers.items():
            layer, start, rows = (target, "0", "") if isinstance(target, str) else target
            for i in self._indices(layer, sizes):
                name = layer.format(i=i)
                if name in own:  # ComfyUI has names for more than the network has
                    shape = own[name]
                    count = size(rows, sizes) if rows and not rows.startswith("halves") else shape[0]
                    exchanged = rows == "halves" or (rows == "halves of the last" and i == sizes["depth"] - 1)
                    yield path.format(i=i), Place(name, size(start, sizes), count, shape, exchanged)


WHICH: Mapping[str, Callable[[int, Mapping[str, Any]], bool]] = {
    ALL: lambda i, sizes: True,
    "last": lambda i, sizes: i == sizes["depth"] - 1,
    "not last": lambda i, sizes: i != sizes["depth"] - 1,
    "dual": lambda i, sizes: i in sizes.get("dual", ()),
    "not dual": lambda i, sizes: i not in sizes.get("dual", ()),
}


def size(text: str, sizes: Mapping[str, Any]) -> int:
    """``q + 2 k`` in numbers."""
    return sum(
        math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in term.split())
        for term in text.split("+")
    )


def placed(names: Mapping[str, Place], key: str) -> tuple[Place | None, str]:
    """What a tensor of a file belongs to, and which tensor of a layer it is: ``up``, ``down`` or ``alpha``."""
    match = re.fullmatch(r"(.+)\.(?:(lora_up|lora_B)\.weight|(lora_down|lora_A)\.weight|alpha)", key)
    assert match, key
    return names.get(match[1]), "up" if match[2] else "down" if match[3] else "alpha"


def in_blocks(ours: str, theirs: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of one kind of block with both lists' names before its entries."""
    found = {}
    for path, target in table.items():
        layer, *rest = (target,) if isinstance(target, str) else target
        name = f"{theirs}.{{i}}.{layer}"
        found[f"{ours}.{{i}}.{path}"] = (name, *rest) if rest else name
    return found


def thirds(layer: str, paths: tuple[str, str, str], width: str = "d") -> dict[str, tuple[str, str, str]]:
    """Queries, keys and values of one width in one layer."""
    return {path: (layer, f"{n} {width}", width) for n, path in enumerate(paths)}


TO = ("attn.to_q", "attn.to_k", "attn.to_v")
ADD = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

# -- Stable Diffusion 3: comfy/ldm/modules/diffusionmodules/mmdit.py, mmdit_to_diffusers ------------------------------

SD3 = Client(
    layers=(
        ("x_embedder.proj", "d", "latent"),
        ("context_embedder", "d", "text"),
        *((f"t_embedder.mlp.{n}", "d", columns) for n, columns in ((0, "256"), (2, "d"))),
        *((f"y_embedder.mlp.{n}", "d", columns) for n, columns in ((0, "pooled"), (2, "d"))),
        ("final_layer.adaLN_modulation.1", "2 d", "d"),
        ("final_layer.linear", "latent", "d"),
        ("joint_blocks.{i}.x_block.attn.qkv", "3 d", "d"),
        ("joint_blocks.{i}.x_block.attn.proj", "d", "d"),
        ("joint_blocks.{i}.x_block.attn2.qkv", "3 d", "d", "dual"),
        ("joint_blocks.{i}.x_block.attn2.proj", "d", "d", "dual"),
        ("joint_blocks.{i}.x_block.mlp.fc1", "4 d", "d"),
        ("joint_blocks.{i}.x_block.mlp.fc2", "d", "4 d"),
        ("joint_blocks.{i}.x_block.adaLN_modulation.1", "9 d", "d", "dual"),
        ("joint_blocks.{i}.x_block.adaLN_modulation.1", "6 d", "d", "not dual"),
        ("joint_blocks.{i}.context_block.attn.qkv", "3 d", "d"),
        ("joint_blocks.{i}.context_block.attn.proj", "d", "d", "not last"),
        ("joint_blocks.{i}.context_block.mlp.fc1", "4 d", "d", "not last"),
        ("joint_blocks.{i}.context_block.mlp.fc2", "d", "4 d", "not last"),
        ("joint_blocks.{i}.context_block.adaLN_modulation.1", "6 d", "d", "not last"),
        ("joint_blocks.{i}.context_block.adaLN_modulation.1", "2 d", "d", "last"),
    ),
    blocks={"joint_blocks": "depth", "transformer_blocks": "depth"},
    diffusers={
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": ("final_layer.adaLN_modulation.1", "0", "halves"),
        "proj_out": "final_layer.linear",
        **in_blocks(
            "transformer_blocks",
            "joint_blocks",
            {
                **thirds("x_block.attn.qkv", TO),
                **thirds("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
                **thirds("context_block.attn.qkv", ADD),
                "attn.to_out.0": "x_block.attn.proj",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
                "norm1.linear": "x_block.adaLN_modulation.1",
                "norm1_context.linear": ("context_block.adaLN_modulation.1", "0", "halves of the last"),
            },
        ),
    },
    dotted=("transformer.", "base_model.model."),
    flat=("lora_transformer_", "lycoris_"),
)

# -- FLUX.1, FLUX.2, Chroma: comfy/ldm/flux, comfy/ldm/chroma, flux_to_diffusers -------------------------------------

_FLUX_BLOCKS = {"double_blocks": "depth", "single_blocks": "singles", "distilled_guidance_layer.layers": "approximator"}
_FLUX_MAP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "0", "halves"),
    "proj_out": "final_layer.linear",
    **{f"time_text_embed.{ours}_embedder.linear_{n}": f"{theirs}_in.{layer}_layer"
       for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
       for n, layer in ((1, "in"), (2, "out"))},
    **in_blocks("transformer_blocks", "double_blocks", {
        **thirds("img_attn.qkv", TO), **thirds("txt_attn.qkv", ADD),
        "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
        "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
        "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
    }),
    **in_blocks("single_transformer_blocks", "single_blocks", {
        **thirds("linear1", TO), "proj_mlp": ("linear1", "3 d", "4 d"), "proj_out": "linear2",
        "norm.linear": "modulation.lin", "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2",
    }),
}  # fmt: skip
_FLUX_NAMES: dict[str, Any] = {
    "blocks": _FLUX_BLOCKS,
    "diffusers": _FLUX_MAP,
    "dotted": ("transformer.", ""),
    "flat": ("lycoris_", "lora_transformer_"),
}


def _flux_layers(inner: str, outer: str, *more: Rule) -> tuple[Rule, ...]:
    """The layers that all have; the feed-forwards' inputs are `inner` wide, their outputs' inputs `outer`."""
    return (
        ("img_in", "d", "latent"),
        ("txt_in", "d", "text"),
        ("final_layer.linear", "latent", "d"),
        *((f"double_blocks.{{i}}.{stream}_attn.qkv", "3 d", "d") for stream in ("img", "txt")),
        *((f"double_blocks.{{i}}.{stream}_attn.proj", "d", "d") for stream in ("img", "txt")),
        *((f"double_blocks.{{i}}.{stream}_mlp.0", inner, "d") for stream in ("img", "txt")),
        *((f"double_blocks.{{i}}.{stream}_mlp.2", "d", outer) for stream in ("img", "txt")),
        ("single_blocks.{i}.linear1", f"3 d + {inner}", "d"),
        ("single_blocks.{i}.linear2", "d", f"d + {outer}"),
        *more,
    )


_ADALN: Rule = ("final_layer.adaLN_modulation.1", "2 d", "d")
FLUX = Client(
    layers=_flux_layers(
        "4 d",
        "4 d",
        _ADALN,
        *((f"{name}_in.in_layer", "d", columns)
          for name, columns in (("time", "256"), ("vector", "pooled"), ("guidance", "256"))),
        *((f"{name}_in.out_layer", "d", "d") for name in ("time", "vector", "guidance")),
        *((f"double_blocks.{{i}}.{stream}_mod.lin", "6 d", "d") for stream in ("img", "txt")),
        ("single_blocks.{i}.modulation.lin", "3 d", "d"),
    ),
    **_FLUX_NAMES,
)  # fmt: skip
FLUX2 = Client(
    layers=_flux_layers(
        "6 d",
        "3 d",
        _ADALN,
        *((f"{name}_in.in_layer", "d", "256") for name in ("time", "guidance")),
        *((f"{name}_in.out_layer", "d", "d") for name in ("time", "guidance")),
        *((f"double_stream_modulation_{stream}.lin", "6 d", "d") for stream in ("img", "txt")),
        ("single_stream_modulation.lin", "3 d", "d"),
    ),
    **_FLUX_NAMES,
)
CHROMA = Client(
    layers=_flux_layers(
        "4 d",
        "4 d",
        ("distilled_guidance_layer.in_proj", "guide", "64"),
        ("distilled_guidance_layer.out_proj", "d", "guide"),
        *((f"distilled_guidance_layer.layers.{{i}}.{name}_layer", "guide", "guide") for name in ("in", "out")),
    ),
    **_FLUX_NAMES,
)

# -- Lumina Image 2.0 and Z-Image: comfy/ldm/lumina/model.py, z_image_to_diffusers -----------------------------------

_LUMINA_LISTS = {"layers": "depth", "noise_refiner": "refiners", "context_refiner": "refiners"}


def _lumina_layers(modulation: int) -> tuple[Rule, ...]:
    return (
        ("x_embedder", "d", "latent"),
        ("cap_embedder.1", "d", "text"),
        ("t_embedder.mlp.0", "time", "256"),
        ("t_embedder.mlp.2", "step", "time"),
        ("final_layer.linear", "latent", "d"),
        ("final_layer.adaLN_modulation.1", "d", "step"),
        *((f"{blocks}.{{i}}.adaLN_modulation.{modulation}", "4 d", "step") for blocks in ("layers", "noise_refiner")),
        *((f"{blocks}.{{i}}.attention.qkv", "d + 2 k", "d") for blocks in _LUMINA_LISTS),
        *((f"{blocks}.{{i}}.attention.out", "d", "d") for blocks in _LUMINA_LISTS),
        *((f"{blocks}.{{i}}.feed_forward.w{n}", "f", "d") for blocks in _LUMINA_LISTS for n in (1, 3)),
        *((f"{blocks}.{{i}}.feed_forward.w2", "d", "f") for blocks in _LUMINA_LISTS),
    )


_Z_BLOCK = {
    **thirds("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
    "attention.to_out.0": "attention.out",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}
_Z_MAP: dict[str, Any] = {
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    "all_x_embedder.2-1": "x_embedder",
    **{name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
    **{key: value for blocks in _LUMINA_LISTS for key, value in in_blocks(blocks, blocks, _Z_BLOCK).items()},
}
_LUMINA_NAMES: dict[str, Any] = {
    "blocks": _LUMINA_LISTS,
    "diffusers": _Z_MAP,
    "dotted": ("diffusion_model.", "transformer.", ""),
    "flat": ("lycoris_",),
}
LUMINA2 = Client(layers=_lumina_layers(1), **_LUMINA_NAMES)
Z_IMAGE = Client(layers=_lumina_layers(0), **_LUMINA_NAMES)
