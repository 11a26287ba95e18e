"""LoRAs in the format of kohya's sd-scripts, which ComfyUI, AUTOMATIC1111 and InvokeAI read as well.

A layer is three tensors, ``<name>.lora_down.weight`` (rank, in, ...), ``<name>.lora_up.weight`` (out, rank, ...) and
``<name>.alpha``; its weight changes by alpha / rank * up @ down. `name` is ``lora_unet_`` and the module's path in the
network that sd-scripts trains, with underscores for dots. Architectures that ComfyUI knows by other names have those:
:attr:`.KohyaFormat.names`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ...core.utils.files import whole_file
from ...core.utils.safetensors_header import sort_metadata
from ..files.architecture import SD_SCRIPTS, KohyaFormat, Layer, LayerNames, Layers
from ..files.reading import quiet_libraries
from ..loras.adapter_file import stated_scale
from ..loras.lora_files import WEIGHTS
from ..loras.plain_lora import read_by_diffusers, scaled, scaled_dtype

if TYPE_CHECKING:
    from ..files.architecture import Architecture


REMEDY = f"use student/{WEIGHTS}, which diffusers reads, and ComfyUI where it knows the architecture"


def export_kohya(
    architecture: Architecture,
    config: Mapping[str, Any],
    student: Path,
    file: Path,
    *,
    title: str,
    dtype: torch.dtype | None = None,
    predicts_v: bool = False,
) -> list[str]:
    """Write the LoRA of a student's folder once more, as `file`, completely or not at all.

    Alpha is the rank, and the scale in the weights, since not every reader heeds alpha. The result is read with
    diffusers' own reader before it is moved into place, where that reads such files.

    Args:
        architecture: The student's architecture.
        config: The denoiser's config.
        student: The exported folder.
        file: The file to write.
        title: Name of the LoRA.
        dtype: Type of the tensors; None: that of the student's.
        predicts_v: Whether the model predicts v.

    Returns:
        Notes for users of the file, a line each.

    Raises:
        UserError: It is no LoRA, or one that the format cannot hold.
    """
    from ...core.diffusion.flow_map import WEIGHTS as SECOND_TIME

    form = architecture.kohya
    if form is None:
        raise UserError(no_form(architecture), REMEDY)
    if (student / SECOND_TIME).is_file():
        raise UserError(
            f"{student} takes a second time ({SECOND_TIME}), which kohya's format has no place for",
            "use the folder student/ with the pipeline that lies in it",
        )
    layers, about = read_layers(student / WEIGHTS, architecture.denoiser)
    dtype = dtype or next(iter(layers.values())).down.dtype
    layers = {path: at_scale_one(layer) for path, layer in layers.items()}
    state = tensors(form.renamed(layers, config), dtype, form.names)
    with whole_file(file) as partial:
        write_file(partial, state, {**about, **header(form, layers, title=title, predicts_v=predicts_v)})
        if form.beside_diffusers:
            return [f"for {form.beside_diffusers}; in diffusers use student/, as its README.md says"]
        lost = sorted(layers.keys() - readable(partial, architecture, config))
        if set(lost) - set(form.unread):
            raise UserError(f"diffusers would not read {len(lost)} layers of the file, as {lost[0]}", REMEDY)
    return [f"ComfyUI reads {name} in it, diffusers leaves it out" for name in lost]


def no_form(architecture: Architecture) -> str:
    """Return the sentence for an architecture without :attr:`Architecture.kohya`."""
    return f"{architecture.title} has no form in kohya's format that ComfyUI reads"


def read_layers(file: Path, prefix: str) -> tuple[Layers, dict[str, str]]:
    """Read the layers of an exported LoRA by module path, and the rest of its header.

    Raises:
        UserError: The file is not there.
    """
    from safetensors import safe_open

    if not file.is_file():
        raise UserError(
            f"{file.parent} holds no LoRA ({WEIGHTS}): kohya's format is for LoRAs",
            "a fully trained student is a whole pipeline: publish it as it is (hub, s3, archive)",
        )
    with safe_open(file, framework="pt") as opened:
        about = dict(opened.metadata() or {})
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    adapter, ending = json.loads(about.pop("lora_adapter_metadata")), ".lora_A.weight"
    names = [name.removesuffix(ending) for name in state if name.endswith(ending)]
    layers = {
        name.removeprefix(f"{prefix}."): Layer(
            state[f"{name}{ending}"], state[f"{name}.lora_B.weight"], stated_scale(adapter, name)["alpha"]
        )
        for name in names
    }
    about.pop("format", None)
    return layers, about


def tensors(layers: Layers, dtype: torch.dtype, names: LayerNames = SD_SCRIPTS) -> dict[str, Tensor]:
    """Return the file's tensors, from layers by the file's paths, whose alpha is their rank where it has no alphas."""
    found = {}
    for path, layer in layers.items():
        name = f"{names.prefix}{path.replace('.', names.separator)}"
        found[f"{name}.{names.down}.weight"] = layer.down.to(dtype).contiguous()
        found[f"{name}.{names.up}.weight"] = layer.up.to(dtype).contiguous()
        if names.alpha:
            found[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)  # half precision rounds 301 to 300
    return found


def header(form: KohyaFormat, layers: Layers, *, title: str, predicts_v: bool = False) -> dict[str, str]:
    """Return the metadata that sd-scripts and programs that list LoRAs read."""
    base_model, architecture = (predicts_v and form.of_v) or (form.base_model, form.architecture)
    first = next(iter(layers.values()))
    dim, alpha = str(first.rank), f"{first.alpha:g}"
    convolutions = any(layer.down.shape[2:].numel() > 1 for layer in layers.values())
    return {
        "ss_network_module": form.module,
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        **({"ss_network_args": json.dumps({"conv_dim": dim, "conv_alpha": alpha})} if convolutions else {}),
        "ss_base_model_version": base_model,
        "ss_v2": str(form.second_generation),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": title,
        "format": "pt",
    }


def write_file(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    save_file(dict(state), path, metadata=dict(metadata))
    sort_metadata(path)


def readable(file: Path, architecture: Architecture, config: Mapping[str, Any]) -> set[str]:
    """Return the paths, as diffusers names them, of the modules that it finds in a LoRA.

    Raises:
        UserError: It cannot read the file.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        state = dict(read_by_diffusers(str(file), 1.0, architecture, config).state)
    except (AssertionError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"diffusers cannot read the file: {str(error).strip() or type(error).__name__}", REMEDY) from (
            error
        )
    with quiet_libraries():
        if not any("lora_A" in name for name in state):
            state = convert_unet_state_dict_to_peft(state)
    prefix, ending = f"{architecture.denoiser}.", ".lora_A.weight"
    return {
        name.removeprefix(prefix).removesuffix(ending)
        for name in state
        if name.startswith(prefix) and name.endswith(ending)
    }


# -- names ------------------------------------------------------------------------------------------------------------

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_unet(layers: Layers, config: Mapping[str, Any]) -> Layers:
    """Return the layers of a UNet by the paths of the original code (``input_blocks.4.1...``)."""
    return {original_unet_path(path, config): layer for path, layer in layers.items()}


def original_unet_path(path: str, config: Mapping[str, Any]) -> str:
    """Return the original code's path: ``input_blocks.4.0.in_layers.2`` for ``down_blocks.1.resnets.0.conv1`` and so
    on.

    The original code numbers all layers of a side in one sequence; a change of size is a layer of its own on the way
    down, and goes with the last layer of its level on the way up.
    """
    side, *rest = path.split(".")
    count = config["layers_per_block"] + 1
    if side == "mid_block":
        part, index, *inner = rest
        place = 2 * int(index) if part == "resnets" else 1
        return ".".join(["middle_block", str(place), *_inner(part, inner)])
    if side not in ("down_blocks", "up_blocks"):
        if path not in _ENDS:
            raise UserError(f"{path} has no name in kohya's format", REMEDY)
        return _ENDS[path]
    level, part, index, *inner = rest
    number = count * int(level)
    if part == "downsamplers":
        return f"input_blocks.{number + count}.0.op"
    if part == "upsamplers":
        behind = 2 if "Attn" in config["up_block_types"][int(level)] else 1
        return f"output_blocks.{number + count - 1}.{behind}.conv"
    side, number = ("input_blocks", number + 1) if side == "down_blocks" else ("output_blocks", number)
    return ".".join([side, str(number + int(index)), str(int(part == "attentions")), *_inner(part, inner)])


def unet_place(path: str, config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the original code's path of a UNet's module, and the module: there, each is a layer of its own."""
    return original_unet_path(path, config), (path,)


def _inner(part: str, inner: Sequence[str]) -> Sequence[str]:
    return [_RESNET[inner[0]], *inner[1:]] if part == "resnets" else inner


def fused(layers: Sequence[Layer]) -> Layer:
    """Return one layer for several layers of the same input, with their outputs concatenated.

    The downs are stacked, the ups form a block diagonal. Alpha grows with the rank, so that the scale stays.
    """
    if len(layers) == 1:
        return layers[0]
    return Layer(
        torch.cat([layer.down for layer in layers]),
        torch.block_diag(*(layer.up for layer in layers)),
        sum(layer.alpha for layer in layers),
    )


def at_scale_one(layer: Layer) -> Layer:
    """Return the same change of the weight with an alpha equal to the rank, for readers that ignore alpha."""
    scale = layer.alpha / layer.rank
    up = layer.up if scale == 1 else scaled(layer.up, scale, dtype=scaled_dtype(layer.up.dtype, scale))
    return Layer(layer.down, up, float(layer.rank))
