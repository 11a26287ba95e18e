"""From a validated configuration to the objects of a run: family, method, networks of a finished run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..config.quantisation import TEACHER, named_quantizers
from ..config.requirements import with_parts
from ..errors import UserError
from ..plugin_api.family import LoraSettings, ModelFamily, ModelSettings, Precision
from ..plugin_api.method import Method, MethodSetup, Requirements, completed
from ..plugin_api.precision import BASE, Precisions
from ..plugin_api.quantizer import NO_CHANGE, Quantizer
from ..settings.configuration import data_resolution
from ..utils.devices import resolve_device
from .output_folder import CACHE_FOLDER

if TYPE_CHECKING:
    from ..data.pipeline import DataPipeline
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..settings.run_settings import RunSettings

_WEIGHT_DTYPES: dict[str, Precision] = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""mixed_precision -> type of the frozen weights."""
ITEM_BYTES: dict[Precision, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number of each type."""


def model_settings(configuration: Configuration, *, source: str | None = None) -> ModelSettings:
    """Which model the run uses, and how it is held in memory.

    Args:
        configuration: The run's.
        source: The model where the run names none (the family's miniature).

    Raises:
        UserError: There is neither.
    """
    run = configuration.run
    chosen = run.pretrained_model_name_or_path or source
    if chosen is None:
        raise UserError(
            f"pretrained_model_name_or_path is missing, and {run.model_family} ships no miniature",
            "name a model: --model PATH_OR_ID",
        )
    return ModelSettings(
        source=str(chosen),
        vae=run.pretrained_vae_model_name_or_path,
        pixel_decoder=run.pixel_decoder,
        teacher_lora=tuple((str(lora.path), lora.weight) for lora in run.teacher_lora),
        partial_loras=tuple(str(lora.path) for lora in run.teacher_lora if not lora.strict),
        init_lora=str(run.init_lora) if run.init_lora else None,
        weight_dtype=_WEIGHT_DTYPES[run.mixed_precision],
        device=resolve_device(run.device),
        revision=run.revision,
        config_source=str(run.model_config_source) if run.model_config_source else None,
        resolution=data_resolution(configuration) if configuration.datasets else None,
    )


def export_dtype(settings: RunSettings) -> Precision | None:
    """Return the type that a run's students are exported in; None for the one that is trained.

    `auto` rounds a LoRA to the type that its passes computed in. A full student keeps its fp32 weights: one that has
    not moved is the checkpoint, bit for bit.
    """
    if settings.export_dtype == "auto":
        kept = settings.mixed_precision == "no" or settings.model_type == "full"
        return None if kept else _WEIGHT_DTYPES[settings.mixed_precision]
    return settings.export_dtype


def build_family(configuration: Configuration, registry: Registry, *, device: str | None = None) -> ModelFamily:
    """The run's family; nothing loads before it is needed.

    Args:
        configuration: The run's.
        registry: The run's plugins.
        device: Where its networks lie; what the run's key says unless given.

    Raises:
        UserError: A quantizer cannot be used on this machine.
    """
    family = registry.get("family", configuration.run.model_family)
    source = str(family.miniature) if family.miniature else None
    settings = model_settings(configuration, source=source)
    settings = replace(settings, device=device) if device else settings
    names = {BASE: "teacher"} if configuration.run.model_type == "full" else {}
    precision = Precisions(_quantizers(configuration, registry, settings.device), names=names)
    return family(configuration.family, replace(settings, precision=precision))


def _quantizers(configuration: Configuration, registry: Registry, device: str) -> dict[str, Quantizer]:
    """Network -> its quantizer; a full student's teacher is the base that its family loads."""
    found: dict[str, Quantizer] = {}
    for key, name in named_quantizers(configuration.run).items():
        quantizer = registry.get("quantizer", name)
        reason = quantizer.usable(device)
        if reason is not None:
            raise UserError(f"{key} = {name!r} cannot be used on {device}: {reason}", f"set {key} to {NO_CHANGE}")
        part = BASE if key == TEACHER else key.removesuffix("_precision")
        found[part] = quantizer(configuration.quantizers[quantizer.name])
    return found


def lora_settings(configuration: Configuration) -> LoraSettings | None:
    """The shape of the student's adapter; None for full training."""
    return None if configuration.run.model_type == "full" else adapter_shape(configuration)


def adapter_shape(configuration: Configuration) -> LoraSettings:
    """The shape of any adapter of the run; a fully trained student may have one beside it."""
    run = configuration.run
    return LoraSettings(run.lora_rank, run.lora_alpha, run.lora_dropout, run.lora_target_modules or None)


def build_method(configuration: Configuration, registry: Registry, family: ModelFamily) -> Method:
    """The run's method, told what it may know of the model."""
    found, setup = registry.get("method", configuration.run.distillation_method), method_setup(configuration, family)
    config = completed(found, configuration.method, setup)
    found.requires(config, setup)  # refuses what cannot be meant for this model
    return found(config, setup)


def method_setup(configuration: Configuration, family: ModelFamily) -> MethodSetup:
    """Return what a method may know of the run and of its model, whose configs are read."""
    run = configuration.run
    return MethodSetup(
        model_type=run.model_type, prediction_type=family.prediction_type, use_ema=run.use_ema,
        guided_by_input=family.guided_by_input, usual_guidance=family.usual_guidance,
        has_images=any(entry.has_images for entry in configuration.datasets),
    )  # fmt: skip


def completed_configuration(configuration: Configuration, registry: Registry, family: ModelFamily) -> Configuration:
    """Return the configuration with the method's defaults that depend on the model filled in."""
    method = build_method(configuration, registry, family)
    if method.config == configuration.method:
        return configuration
    before, now = (config.model_dump() for config in (configuration.method, method.config))
    changed = ", ".join(f"{key} {value:g}" for key, value in now.items() if before[key] != value)
    line = f"the model takes the guidance scale as an input: {changed}, its usual one, for what nobody set"
    return replace(configuration, method=method.config, notices=(*configuration.notices, line))


def method_needs(configuration: Configuration, registry: Registry, family: ModelFamily) -> Requirements:
    """Return the requirements of the run's method; loads no weights."""
    method = build_method(configuration, registry, family)
    return method.requires(method.config, method.setup)


def check_method_sources(configuration: Configuration, registry: Registry) -> None:
    """Raise UserError where something that the method's settings name, or those of a method inside it, is not there."""
    name = configuration.run.distillation_method
    method = registry.get("method", name)
    for path, found, config in with_parts(method, configuration.method, f"distillation_config.{name}"):
        found.check_sources(config, path=path)


def build_pipeline(
    configuration: Configuration,
    registry: Registry,
    *,
    family: ModelFamily | None = None,
    trajectories: bool = True,
) -> DataPipeline:
    """The data path of a run, outside of one: for one process, with the caches where the run would have them.

    Args:
        configuration: The run's.
        registry: The run's plugins.
        family: The run's; built and its files checked unless given.
        trajectories: Whether the distillation caches of the data file are made too.
    """
    from ..data.loader import BatchContents, BatchLayout
    from ..data.pipeline import DataPipeline

    run = configuration.run
    if family is None:
        family = build_family(configuration, registry)
        family.check_source()
    return DataPipeline(
        configuration, registry, family,
        layout=BatchLayout(run.train_batch_size, run.gradient_accumulation_steps),
        contents=BatchContents(
            images=method_needs(configuration, registry, family).images,
            trajectories=trajectories and bool(configuration.distillation_caches),
        ),
        seed=run.seed, cache_root=run.output_dir / CACHE_FOLDER,
    )  # fmt: skip
