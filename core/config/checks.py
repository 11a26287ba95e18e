"""Checks for settings that contradict each other, have the wrong unit or cannot work on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import Finding, UserError
from ..settings.dataset_settings import DatasetSettings
from ..settings.run_settings import RunSettings
from ..settings.types import LONGEST_EDGE
from ..utils.devices import cuda_available
from ..utils.prompt_library import read_library
from .coercion import is_local
from .reading import ConfigReport

MAX_MEGAPIXELS = 64
"""A larger area is a number of pixels that was given as megapixels."""
MAX_SOURCE_PIXELS = 1_000_000
"""A larger edge is none that an image file has."""
MAX_STEP_SAMPLES = 2**20
"""Samples of an optimizer step of one process: the order of a step's samples is made as a whole."""
MIN_PIXELS = 8
"""A smaller edge is a number of megapixels that was given as pixels."""
_DEVICE = re.compile(r"(auto|cpu|mps|cuda(:\d+)?)$")


def check_run(run: RunSettings, report: ConfigReport, *, to_train: bool = True, adapters: Sequence[str] = ()) -> None:
    """Check everything about the run's keys that no single field's limits can express.

    Args:
        run: The settings.
        report: Where findings and notices go.
        to_train: Also check the files and the device, which only training needs.
        adapters: Networks beside a fully trained student that are adapters.
    """
    _check_lora(run, report, adapters)
    for check in (_check_length, _check_validation, _check_tracking):
        check(run, report)
    for check in (_check_precision, _check_paths) if to_train else ():
        check(run, report)
    check_sizes(run, report)


def _check_length(run: RunSettings, report: ConfigReport) -> None:
    steps, epochs = run.max_train_steps, run.num_train_epochs
    if steps is None and epochs is None:
        problem = "is required: neither max_train_steps nor num_train_epochs is set"
        report.refuse("max_train_steps", None, problem, "set max_train_steps, as --set max_train_steps=1000")
    if run.train_batch_size * run.gradient_accumulation_steps > MAX_STEP_SAMPLES:
        problem = f"times train_batch_size = {run.train_batch_size:,} is more than {MAX_STEP_SAMPLES:,} samples a step"
        report.refuse("gradient_accumulation_steps", run.gradient_accumulation_steps, problem, "lower one of the two")
    if steps is not None and epochs is not None:
        report.note(f"max_train_steps = {steps} and num_train_epochs = {epochs}: whichever ends first")
    if steps is not None and run.lr_warmup_steps >= steps and run.lr_warmup_steps:
        report.note(
            f"lr_warmup_steps = {run.lr_warmup_steps} is not below max_train_steps = {steps}: "
            "the learning rate never reaches its value"
        )
    if run.ema_decay != RunSettings.model_fields["ema_decay"].default and not run.use_ema:
        report.note(f"ema_decay = {run.ema_decay} has no effect without use_ema")


def _check_precision(run: RunSettings, report: ConfigReport) -> None:
    if not _DEVICE.match(run.device):
        remedy = "accepted: auto, cpu, cuda, cuda:0, ..."
        report.refuse("device", run.device, "is not a device", remedy)
        return
    if run.device.startswith("cuda") and not cuda_available():
        report.refuse("device", run.device, "is not there: PyTorch sees no CUDA device", "set device to auto or cpu")
        return
    on_cpu = run.device == "cpu" or (run.mixed_precision == "fp16" and run.device == "auto" and not cuda_available())
    if run.mixed_precision == "fp16" and on_cpu:
        report.note(
            "mixed_precision = fp16 on a CPU is for tests: most processors compute it slowly, or by way of fp32"
        )


def _check_lora(run: RunSettings, report: ConfigReport, adapters: Sequence[str]) -> None:
    if run.model_type == "lora":
        return
    if run.init_lora is not None:
        problem = "starts a LoRA, but model_type is full"
        report.refuse("init_lora", run.init_lora, problem, "set model_type to lora, or fuse it by teacher_lora")
    keys = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")
    unused = [key for key in keys if report.layers.given(key)]
    if unused and adapters:
        report.note(f"{', '.join(unused)}: of the {' and '.join(adapters)} alone with model_type full")
    elif unused:
        report.note(f"{', '.join(unused)}: no effect with model_type full")


def _check_validation(run: RunSettings, report: ConfigReport) -> None:
    if run.validation_negative_prompt and (run.validation_guidance or 0) <= 1:
        report.note("validation_negative_prompt has no effect without guidance (validation_guidance is 0 or 1)")


def _check_paths(run: RunSettings, report: ConfigReport) -> None:
    models = {
        "pretrained_model_name_or_path": run.pretrained_model_name_or_path,
        "pretrained_vae_model_name_or_path": run.pretrained_vae_model_name_or_path,
        "pixel_decoder": run.pixel_decoder,
        "init_lora": run.init_lora,
        **{f"teacher_lora.{index}": lora.path for index, lora in enumerate(run.teacher_lora)},
    }
    for key, value in models.items():
        if value is not None and is_local(value) and not os.path.exists(value):
            remedy = "give a hub id as `name/model`, a folder in diffusers layout or a .safetensors file that is there"
            report.refuse(key, value, "does not exist", remedy)
        elif value is not None and not is_local(value) and not is_hub_id(value):
            remedy = "hub ids are `name/model`; a path starts with / or ./"
            report.refuse(key, value, "is neither an existing path nor a hub id", remedy)
    library = run.validation_prompt_library
    if library is not None:
        try:
            read_library(library)
        except UserError as error:
            report.refuse("validation_prompt_library", str(library), error.message, error.remedy)
    source = run.model_config_source
    if source is not None and not source.is_dir():
        remedy = "give a folder with the model's configs and tokenizers"
        report.refuse("model_config_source", str(source), "is not a folder", remedy)
    if os.path.exists(run.output_dir) and not run.output_dir.is_dir():
        report.refuse("output_dir", str(run.output_dir), "is a file", "give a folder: --output-dir DIR")


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
LONGEST_HUB_ID = 96


def is_hub_id(text: str) -> bool:
    """Return whether the Hugging Face hub could have a repository of this name."""
    return _HUB_ID.fullmatch(text) is not None and len(text) <= LONGEST_HUB_ID


def _check_tracking(run: RunSettings, report: ConfigReport) -> None:
    if run.push_to_hub and not run.hub_model_id:
        report.note("push_to_hub is set without hub_model_id: the student stays on this machine")
    if run.hub_model_id and not run.push_to_hub:
        report.note(f"hub_model_id = {run.hub_model_id!r} has no effect without push_to_hub")


def check_sizes(settings: Any, report: ConfigReport) -> None:
    """Refuse sizes of a run or a dataset whose unit cannot be meant, and a minimum above the maximum."""
    unit, resolution = settings.resolution_type, settings.resolution
    if unit == "area" and resolution > MAX_MEGAPIXELS:
        problem = f"would be {resolution:g} megapixels under resolution_type area"
        report.refuse("resolution", resolution, problem, "set resolution_type to pixel_area, or give megapixels as 1.0")
    if unit != "area" and not MIN_PIXELS <= resolution <= LONGEST_EDGE:
        problem = f"would be {resolution:g} pixels under resolution_type {unit}"
        report.refuse("resolution", resolution, problem, "set resolution_type to area, or give pixels as 1024")
    for key in ("minimum_image_size", "maximum_image_size", "target_downsample_size"):
        value = getattr(settings, key)
        if value is not None and unit == "area" and value > MAX_MEGAPIXELS:
            problem = f"would be {value:g} megapixels under resolution_type area"
            report.refuse(key, value, problem, "give megapixels, as 1.0, or another resolution_type")
        if value is not None and unit != "area" and value > MAX_SOURCE_PIXELS:
            problem = f"would be {value:g} pixels under resolution_type {unit}"
            report.refuse(key, value, problem, "give pixels, as 512, or leave it out")
        if value is not None and unit == "pixel_area" and 0 < value < MIN_PIXELS:
            problem = f"would be {value:g} pixels under resolution_type pixel_area"
            report.refuse(key, value, problem, "give pixels, as 512, or resolution_type area")
    _check_order(settings, report)


def _check_order(settings: Any, report: ConfigReport) -> None:
    def area(value: float) -> float:
        as_area = settings.resolution_type == "area" or (settings.resolution_type == "pixel" and value < MIN_PIXELS)
        return value if as_area else value * value / 1e6

    low, high, target = settings.minimum_image_size, settings.maximum_image_size, settings.target_downsample_size
    if low is not None and high is not None and area(low) > area(high):
        problem = f"is above maximum_image_size = {high:g}, so every image would be left out"
        report.refuse("minimum_image_size", low, problem, "lower minimum_image_size or raise maximum_image_size")
    if target is not None and high is not None and area(target) > area(high):
        problem = f"is above maximum_image_size = {high:g}: images cannot be scaled down to a larger size"
        report.refuse("target_downsample_size", target, problem, "lower it to maximum_image_size or leave it out")


def check_dataset(entry: DatasetSettings, report: ConfigReport) -> None:
    """Check the settings of one enabled dataset."""
    check_sizes(entry, report)
    low, high = entry.minimum_aspect_ratio, entry.maximum_aspect_ratio
    if low is not None and high is not None and low > high:
        problem = f"is above maximum_aspect_ratio = {high:g}, so every image would be left out"
        report.refuse("minimum_aspect_ratio", low, problem, "lower one or raise the other")
    if entry.end_step is not None and entry.end_step <= entry.start_step:
        problem = f"is not above start_step = {entry.start_step}, so the dataset would never be used"
        report.refuse("end_step", entry.end_step, problem, "raise end_step or leave it out")
    wants_prompt = entry.caption_strategy == "instanceprompt"
    if (wants_prompt or entry.prepend_instance_prompt or entry.only_instance_prompt) and not entry.instance_prompt:
        asked = "caption_strategy" if wants_prompt else "prepend_instance_prompt or only_instance_prompt"
        report.refuse("instance_prompt", None, f"is required by {asked}", 'add "instance_prompt": "a photo of ..."')
    if isinstance(entry.caption_filter_list, Path) and not entry.caption_filter_list.is_file():
        path = str(entry.caption_filter_list)
        report.refuse("caption_filter_list", path, "does not exist", "give a list of texts, or a file that is there")


def check_folder(entry: DatasetSettings, report: ConfigReport) -> None:
    """Refuse a folder where the backend reads none."""
    own = type(entry.backend).model_fields if entry.backend is not None else {}
    if entry.instance_data_dir is not None and "instance_data_dir" not in own:
        problem = f"is not read by the data backend {entry.type!r}"
        remedy = f"leave it out; its own keys: {', '.join(own) or 'none'}"
        report.refuse("instance_data_dir", str(entry.instance_data_dir), problem, remedy)


def check_weights(entries: Iterable[DatasetSettings], file: str, findings: list[Finding]) -> None:
    """Refuse datasets whose probabilities are all 0."""
    entries = list(entries)
    if entries and all(entry.probability == 0 for entry in entries):
        names = ", ".join(f"data.{entry.id}.probability" for entry in entries)
        problem = "is 0 for every dataset, so nothing would be drawn"
        findings.append(Finding(file, names, 0, problem, "give at least one dataset a probability above 0"))
