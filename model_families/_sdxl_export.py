"""Students of the SDXL family on disk: what plain diffusers loads, and the lines that do so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.errors import UserError
from ..core.second_time import SCHEDULER, active_second_time, export_second_time, put_aside
from ._sdxl_files import quiet_libraries
from ._sdxl_lora import WEIGHTS

if TYPE_CHECKING:
    from ..core.family import ExportInfo, ModelSettings
    from ._sdxl_source import TextEncoders


def export_lora(network: nn.Module, folder: Path, info: ExportInfo) -> None:
    """Write the adapter in diffusers' format; rank and alpha go along as adapter metadata.

    ``info.metadata`` is added to the header of the file.
    """
    with quiet_libraries():
        from diffusers import StableDiffusionXLPipeline
        from peft.utils import get_peft_model_state_dict

        unet: Any = network
        layers: Any = get_peft_model_state_dict(unet, adapter_name=info.adapter)
        # peft's own names throughout: diffusers' converter renames those of the attention only, and its loader, which
        # decides by the first name, then drops them in silence
        StableDiffusionXLPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers,
            unet_lora_adapter_metadata=_in_order(unet.peft_config[info.adapter].to_dict()),
        )
    if info.metadata:
        _add_metadata(folder / WEIGHTS, dict(info.metadata))


def _in_order(config: dict[str, Any]) -> dict[str, Any]:
    """Sets as sorted lists, so that the same student is the same file."""
    return {key: sorted(value) if isinstance(value, set | frozenset) else value for key, value in config.items()}


def _add_metadata(path: Path, metadata: dict[str, str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        kept = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, path, metadata={**metadata, **kept})


def export_pipeline(
    network: nn.Module,
    folder: Path,
    scheduler: Any,
    text: TextEncoders,
    vae: nn.Module,
    *,
    info: ExportInfo,
    zeros: bool,
) -> None:
    """Write the whole pipeline around a fully trained UNet; ``info.metadata`` lies beside it as ``metadata.json``."""
    with quiet_libraries():
        from diffusers import StableDiffusionXLPipeline

        # a scheduler that plain diffusers lacks stays out: better no picture than one without the second time
        own = None if info.sampler.scheduler == SCHEDULER else scheduler
        parts: dict[str, Any] = {"unet": network, "vae": vae, "scheduler": own}
        parts |= dict(zip(("tokenizer", "tokenizer_2"), text.tokenizers, strict=True))
        parts |= dict(zip(("text_encoder", "text_encoder_2"), text.encoders, strict=True))
        pipeline = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
        with put_aside(network):
            pipeline.save_pretrained(folder, safe_serialization=True)
    if info.metadata:
        (folder / "metadata.json").write_text(json.dumps(dict(info.metadata), indent=2) + "\n", encoding="utf-8")


def export_sampler(network: nn.Module, folder: Path, scheduler: Any, info: ExportInfo) -> None:
    """Write ``scheduler/`` and, for a flow map, the code and the embedding that plain diffusers lacks."""
    if info.sampler.scheduler == SCHEDULER:
        export_second_time(network, folder, component="unet", name=info.adapter)
    elif active_second_time(network) is not None:
        raise ValueError(f"a student with a second time is run with {SCHEDULER}, not {info.sampler.scheduler}")
    scheduler.save_pretrained(folder / "scheduler")


def student_lora(folder: Path) -> list[tuple[str, float]]:
    """The student's adapter at weight 1, or nothing for a fully trained student. Raises UserError for neither."""
    if (folder / WEIGHTS).is_file():
        return [(str(folder / WEIGHTS), 1.0)]
    if (folder / "unet" / "config.json").is_file():
        return []
    raise UserError(
        f"{str(folder)!r} holds no student: neither {WEIGHTS} nor unet/",
        "name the folder student/ of a finished run (or the run's output_dir)",
    )


def load_unet(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The UNet of a fully trained student, on the CPU."""
    with quiet_libraries():
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )


def usage_snippet(settings: ModelSettings, info: ExportInfo, *, variant: str | None, flow: bool) -> str:
    """Plain diffusers code that makes a picture with the exported student."""
    lora, flow_map = info.model_type == "lora", info.sampler.scheduler == SCHEDULER
    schedulers = {info.sampler.scheduler} if lora and not flow_map else set()
    imports = sorted({"StableDiffusionXLPipeline", *schedulers})
    if lora and settings.vae:
        imports.insert(0, "AutoencoderKL")
    lines = ["from runpy import run_path", ""] if flow_map else []
    lines += ["import torch", f"from diffusers import {', '.join(imports)}", ""]
    lines += ['device = "cuda" if torch.cuda.is_available() else "cpu"']
    lines += ['dtype = torch.float16 if device == "cuda" else torch.float32']
    hub = "from the hub: huggingface_hub.snapshot_download(id)" if flow_map else "or its hub id"
    lines += [f'student = "student"  # the folder of this file, {hub}']
    lines += _load_lora(settings, info, variant) if lora else _load_full(flow_map)
    if flow_map:
        lines += ['run_path(f"{student}/flow_map.py")["attach"](pipe, student)  # its scheduler, its second time']
    elif flow:
        lines += ["pipe.scheduler.init_noise_sigma = 1.0  # the SDXL pipeline asks a flow scheduler for these two"]
        lines += ["pipe.scheduler.scale_model_input = lambda sample, timestep: sample"]
    return "\n".join([*lines, *_call(info)]) + "\n"


def _load_full(flow_map: bool) -> list[str]:
    extra = ", scheduler=None" if flow_map else ""
    return [f"pipe = StableDiffusionXLPipeline.from_pretrained(student, torch_dtype=dtype{extra}).to(device)"]


def _load_lora(settings: ModelSettings, info: ExportInfo, variant: str | None) -> list[str]:
    extra = f", variant={variant!r}" if variant else ""
    extra += f", config={settings.config_source!r}" if settings.config_source else ""
    lines = []
    if settings.vae:
        lines += [f"vae = AutoencoderKL.from_pretrained({settings.vae!r}, torch_dtype=dtype)"]
        extra += ", vae=vae"
    load = "from_single_file" if settings.source.endswith(".safetensors") else "from_pretrained"
    lines += [f"pipe = StableDiffusionXLPipeline.{load}({settings.source!r}, torch_dtype=dtype{extra}).to(device)"]
    for path, weight in settings.teacher_lora:
        lines += [f"pipe.load_lora_weights({path!r})  # part of the teacher", f"pipe.fuse_lora(lora_scale={weight})"]
        lines += ["pipe.unload_lora_weights()"]
    lines += ["pipe.load_lora_weights(student)"]
    scheduler = info.sampler.scheduler
    if scheduler == SCHEDULER:
        return lines
    return [*lines, f'pipe.scheduler = {scheduler}.from_pretrained(student, subfolder="scheduler")']


def _call(info: ExportInfo) -> list[str]:
    sampler = info.sampler
    extra = "".join(f", {key}={value!r}" for key, value in sampler.call.items())
    steps = f"num_inference_steps={sampler.num_inference_steps}, guidance_scale={sampler.guidance_scale}"
    return [
        'prompt = "a photo of a fox in the snow"',
        f"image = pipe(prompt, {steps}{extra}).images[0]",
        'image.save("fox.png")',
    ]
