"""The lines of plain diffusers code that people paste to use a student."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.diffusion.second_time import SCHEDULER
from ..loras.lora_files import WEIGHTS

if TYPE_CHECKING:
    from ...core.plugin_api.family import ExportInfo, ModelSettings
    from ..files.architecture import Architecture

PEFT = [
    "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict",
    "from safetensors.torch import load_file",
]
"""Imports of the lines that load an adapter without diffusers."""


def usage_snippet(
    architecture: Architecture,
    settings: ModelSettings,
    info: ExportInfo,
    *,
    variant: str | None,
    absent: Sequence[str],
    neutral: bool,
    by_hand: Sequence[str],
    call: Mapping[str, Any],
) -> str:
    """Return plain diffusers code that makes an image with the exported student.

    Args:
        architecture: The architecture whose pipeline it uses.
        settings: The model that the student was made from.
        info: Facts of the export.
        variant: Variant of the model's files.
        absent: Parts that the pipeline is loaded without.
        neutral: Whether the pipeline asks its scheduler for two attributes that flow schedulers lack.
        by_hand: LoRAs of the teacher that diffusers cannot fuse as they were fused.
        call: Arguments of the pipeline's call after the prompt.
    """
    lora, flow_map = info.model_type == "lora", info.sampler.scheduler == SCHEDULER
    schedulers = {info.sampler.scheduler} if lora and not flow_map else set()
    imports = sorted({architecture.pipeline, *schedulers})
    if lora and settings.vae:
        imports.insert(0, architecture.autoencoder)
    lines = ["from runpy import run_path", ""] if flow_map else []
    lines += ["import torch", f"from diffusers import {', '.join(imports)}"]
    by_peft = lora and not architecture.loads_loras() and not architecture.network_loads_loras()
    lines += [*(PEFT if by_peft else []), ""]
    lines += ['device = "cuda" if torch.cuda.is_available() else "cpu"']
    lines += [f'dtype = torch.{architecture.half} if device == "cuda" else torch.float32']
    hub = "from the hub: huggingface_hub.snapshot_download(id)" if flow_map else "or its hub id"
    lines += [f'student = "student"  # the folder of this file, {hub}']
    without = "".join(f", {part}=None" for part in absent)
    if lora:
        lines += _load_lora(architecture, settings, info, variant, without, by_hand)
    else:
        lines += _load_full(architecture, flow_map, without)
    if flow_map:
        lines += ['run_path(f"{student}/flow_map.py")["attach"](pipe, student)  # its scheduler, its second time']
    elif neutral:
        lines += ["pipe.scheduler.init_noise_sigma = 1.0  # this pipeline asks a flow scheduler for these two"]
        lines += ["pipe.scheduler.scale_model_input = lambda sample, timestep: sample"]
    return "\n".join([*lines, *_call(architecture, call)]) + "\n"


def _load_full(architecture: Architecture, flow_map: bool, without: str) -> list[str]:
    extra = without + (", scheduler=None" if flow_map else "")
    return [f"pipe = {architecture.pipeline}.from_pretrained(student, torch_dtype=dtype{extra}).to(device)"]


def _load_lora(
    architecture: Architecture,
    settings: ModelSettings,
    info: ExportInfo,
    variant: str | None,
    without: str,
    by_hand: Sequence[str],
) -> list[str]:
    extra = without + (f", variant={variant!r}" if variant else "")
    extra += f", config={settings.config_source!r}" if settings.config_source else ""
    lines = []
    if settings.vae:
        lines += [f"vae = {architecture.autoencoder}.from_pretrained({settings.vae!r}, torch_dtype=dtype)"]
        extra += ", vae=vae"
    load = "from_single_file" if settings.source.endswith(".safetensors") else "from_pretrained"
    lines += [f"pipe = {architecture.pipeline}.{load}({settings.source!r}, torch_dtype=dtype{extra}).to(device)"]
    for path, weight in settings.teacher_lora:
        if path in by_hand:
            lines += [f"# part of the teacher at weight {weight}: {path}, which diffusers reads in part or not;"]
            lines += ["# merge it into the model with the tool that it was made with, and name the merged model above"]
            continue
        if not architecture.loads_loras():
            lines += [f"# part of the teacher at weight {weight}: {path}, which this pipeline does not load;"]
            lines += ["# merge it into the model (`distill lora merge`), and name the merged model above"]
            continue
        lines += [f"pipe.load_lora_weights({path!r})  # part of the teacher", f"pipe.fuse_lora(lora_scale={weight})"]
        lines += ["pipe.unload_lora_weights()"]
    lines += _load_adapter(architecture)
    scheduler = info.sampler.scheduler
    if scheduler == SCHEDULER:
        return lines
    return [*lines, f'pipe.scheduler = {scheduler}.from_pretrained(student, subfolder="scheduler")']


def _load_adapter(architecture: Architecture) -> list[str]:
    if architecture.loads_loras():
        return ["pipe.load_lora_weights(student)"]
    if architecture.network_loads_loras():
        network = f"pipe.{architecture.denoiser}"
        return [f'{network}.load_lora_adapter(student, weight_name="{WEIGHTS}")  # this pipeline loads no LoRAs itself']
    return _by_peft(architecture.denoiser)


def _by_peft(part: str) -> list[str]:
    """Return lines that put the student's adapter into a network whose pipeline loads no LoRAs."""
    return [
        f'weights = load_file(f"{{student}}/{WEIGHTS}")  # with peft: this pipeline loads no LoRAs itself',
        f'weights = {{name.removeprefix("{part}."): value for name, value in weights.items()}}',
        'rank = next(len(value) for name, value in weights.items() if "lora_A" in name)',
        'layers = sorted({name.partition(".lora_")[0] for name in weights})',
        f"inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), pipe.{part})",
        f"set_peft_model_state_dict(pipe.{part}, weights)",
        f"pipe.{part}.to(device, dtype)",
    ]


def _call(architecture: Architecture, call: Mapping[str, Any]) -> list[str]:
    first = list(inspect.signature(architecture.pipeline_class().__call__).parameters)[1]  # of some, an image
    arguments = ", ".join(f"{key}={value!r}" for key, value in call.items())
    return [
        'prompt = "a photo of a fox in the snow"',
        f"image = pipe({'prompt' if first == 'prompt' else 'prompt=prompt'}, {arguments}).images[0]",
        'image.save("fox.png")',
    ]
