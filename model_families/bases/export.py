"""Students on disk, as plain diffusers loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core.diffusion.second_time import SCHEDULER, active_second_time, detached_second_time, export_second_time
from ...core.errors import UserError
from ..files.empty import empty_denoiser
from ..files.encoder_files import file_as
from ..files.reading import quiet_libraries
from ..loras.lora_files import WEIGHTS
from ..loras.plain_lora import scaled, scaled_dtype

if TYPE_CHECKING:
    from ...core.plugin_api.family import ExportInfo
    from ..files.architecture import Architecture, ReadConfig
    from ..files.source import TextEncoders

FOLDED_SCALE = "lora_scale_in_weights"
"""Entry of the file's header: alpha / rank as trained, by which the second factors are multiplied."""


def export_lora(architecture: Architecture, network: nn.Module, folder: Path, info: ExportInfo) -> None:
    """Write the adapter in diffusers' format, with its scale in the weights: alpha is the rank, in the metadata too.

    Readers that know no alpha apply it right so. ``info.metadata`` is added to the header of the file.
    """
    metadata = dict(info.metadata)
    with quiet_libraries():
        from peft.utils import get_peft_model_state_dict

        denoiser: Any = network
        config = in_order(denoiser.peft_config[info.adapter].to_dict())
        layers: Any = get_peft_model_state_dict(denoiser, adapter_name=info.adapter)
        if config["exclude_modules"]:  # readers warn of a layer that is meant by the targets and not in the file
            stems = {name.partition(".lora_")[0] for name in layers}
            config |= {"exclude_modules": None, "target_modules": sorted(stems)}
        if config["lora_alpha"] != config["r"]:
            metadata[FOLDED_SCALE] = f"{config['lora_alpha'] / config['r']:.12g}"
            layers = at_scale_one(layers, scale=config["lora_alpha"] / config["r"])
            config["lora_alpha"] = config["r"]
        if info.dtype is not None:  # after the scale: rounded once
            layers = {name: weight.detach().to(getattr(torch, info.dtype)) for name, weight in layers.items()}
        # peft's own names throughout: diffusers' converter renames those of the attention only, and its loader, which
        # decides by the first name, then drops them in silence
    part = architecture.denoiser
    save_layers(architecture, folder, {part: layers}, {part: config}, metadata)


def save_layers(
    architecture: Architecture,
    folder: Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Mapping[str, Any]],
    metadata: dict[str, str],
) -> None:
    """Write a LoRA as the file of diffusers' format in `folder`.

    Args:
        architecture: The architecture whose pipeline reads it.
        folder: Where it goes.
        layers: Network -> its tensors, in peft's names.
        configs: Network -> peft's settings of its adapter.
        metadata: What is added to the header.
    """
    written: dict[str, Any] = {f"{part}_lora_layers": tensors for part, tensors in layers.items()}
    written |= {f"{part}_lora_adapter_metadata": config for part, config in configs.items()}
    with quiet_libraries():
        architecture.pipeline_class().save_lora_weights(folder, **written)
    if metadata:
        _add_metadata(folder / WEIGHTS, metadata)


def at_scale_one(layers: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """Return the same LoRA for readers that apply no scale: it is in the second factors, ``lora_B``."""
    return {
        name: scaled(weight, scale if ".lora_B." in name else 1.0, dtype=scaled_dtype(weight.dtype, scale))
        for name, weight in layers.items()
    }


def in_order(config: dict[str, Any]) -> dict[str, Any]:
    """Turn sets into sorted lists, so that the same student is the same file."""
    return {key: sorted(value) if isinstance(value, set | frozenset) else value for key, value in config.items()}


def _add_metadata(path: Path, metadata: dict[str, str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        kept = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, path, metadata={**metadata, **kept})


def export_pipeline(
    architecture: Architecture,
    network: nn.Module,
    folder: Path,
    scheduler: Any,
    text: TextEncoders,
    vae: nn.Module,
    *,
    info: ExportInfo,
    arguments: Mapping[str, Any],
) -> None:
    """Write the whole pipeline around a fully trained denoiser; ``info.metadata`` lies beside it as ``metadata.json``.

    Args:
        architecture: The model's architecture.
        network: The student.
        folder: Folder to write to.
        scheduler: The student's scheduler.
        text: Tokenizers and text encoders.
        vae: The autoencoder.
        info: Facts to write beside it.
        arguments: Arguments of the pipeline's constructor, in addition to the architecture's.
    """
    with quiet_libraries():
        # a scheduler that plain diffusers lacks stays out: better no image than one without the second time
        own = None if info.sampler.scheduler == SCHEDULER else scheduler
        parts: dict[str, Any] = {architecture.denoiser: network, "vae": vae, "scheduler": own}
        pipeline = architecture.shell(**parts, **text.tokenizers, **text.encoders, **arguments)
        with detached_second_time(network):
            if info.dtype is not None:
                pipeline.register_modules(**{architecture.denoiser: _as_type(architecture, network, info.dtype)})
            pipeline.save_pretrained(folder, safe_serialization=True)
    if info.metadata:
        _write(folder / "metadata.json", dict(info.metadata))


def file_encoders(folder: Path, text: TextEncoders, read: ReadConfig) -> None:
    """Name the encoders of the pipeline that was saved into `folder` as the teacher's files do where saving did not.

    Args:
        folder: The pipeline.
        text: The encoders in it.
        read: Reads a JSON file of the teacher.
    """
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for part in text.encoders:
        if file_as(read(f"{part}/config.json"), folder / part):
            index[part] = read(path.name)[part]
            _write(path, index)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _as_type(architecture: Architecture, network: Any, dtype: str) -> nn.Module:
    """Return `network` with its weights rounded to `dtype`, in host memory; the network itself stays as it is."""
    copied = empty_denoiser(architecture, dict(network.config))
    rounded = {name: value.detach().to("cpu", getattr(torch, dtype)) for name, value in network.state_dict().items()}
    copied.load_state_dict(rounded, assign=True)
    return copied


def export_sampler(
    architecture: Architecture, network: nn.Module, folder: Path, scheduler: Any, info: ExportInfo
) -> None:
    """Write ``scheduler/`` and, for a flow map, the code and the embedding that plain diffusers lacks."""
    if info.sampler.scheduler == SCHEDULER:
        export_second_time(network, folder, component=architecture.denoiser, name=info.adapter)
    elif active_second_time(network) is not None:
        raise ValueError(f"a student with a second time is run with {SCHEDULER}, not {info.sampler.scheduler}")
    scheduler.save_pretrained(folder / "scheduler")


def student_lora(architecture: Architecture, folder: Path) -> list[tuple[str, float]]:
    """Return the student's adapter at weight 1, or nothing for a fully trained student; raise UserError for neither."""
    if (folder / WEIGHTS).is_file():
        return [(str(folder / WEIGHTS), 1.0)]
    if (folder / architecture.denoiser / "config.json").is_file():
        return []
    raise UserError(
        f"{str(folder)!r} holds no student: neither {WEIGHTS} nor {architecture.denoiser}/",
        "name the folder student/ of a finished run (or the run's output_dir)",
    )


def refill(architecture: Architecture, network: nn.Module, folder: Path, *, adapter: str) -> None:
    """Give the weights of `adapter` the type that they were exported in, or that of the base where it is wider.

    Attaching it rounded them to the type of the base, which would give other images than the trained adapter.
    """
    from safetensors.torch import load_file

    exported = load_file(folder / WEIGHTS)
    for name, weight in network.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            own = exported[f"{architecture.denoiser}.{name.replace(f'.{adapter}.', '.')}"]
            # a copy: weights of a mapped file lie unaligned, for which kernels round otherwise
            weight.data = own.to(weight.device, torch.promote_types(own.dtype, weight.dtype), copy=True)
