"""Conversion of users' other names and units into the canonical ones, with a notice for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..settings.dataset_settings import PIXEL_LIMIT
from .reading import ConfigReport

RUN_ALIASES = {
    "validation_steps": "validation_step_interval",
    "checkpointing_steps": "checkpoint_step_interval",
    "save_total_limit": "checkpoints_total_limit",
}
STREAMED = {"parallel": "fsdp", "parallel_offload": True}
SWITCH_ALIASES: dict[str, dict[str, Any]] = {
    "base_offload": STREAMED,
    "enable_group_offload": STREAMED,
    "fsdp_enable": {"parallel": "fsdp"},
}
"""Keys that switch something on -> the keys that do so here."""
DATASET_VALUES = {
    ("caption_strategy", "instance_prompt"): "instanceprompt",
    ("crop_style", "centre"): "center",
}
METADATA_OBJECTS = ("parquet", "huggingface")
"""Keys of objects with an entry's columns, in the established trainer: of a table beside the images, of a dataset."""
METADATA_KEYS = {"path": "metadata_file", "identifier_includes_extension": ""}
"""Its keys that have another name here, or are not needed: names match with and without their suffix."""
NOT_YET = {
    "deepspeed_config": "set parallel to zero2 or zero3, or give the file to accelerate launch",
    "fsdp_version": "leave it out: parallel = fsdp is torch's second version",
    "quantize_via": "leave it out: base_model_precision decides how and where weights are packed",
    "base_model_default_dtype": "leave it out: mixed_precision decides the type that a quantised base computes in",
    "lycoris_config": "only lora_type `standard` is there; leave it out",
    "controlnet": "an exported student works beside a ControlNet in diffusers; none is trained here",
    "offload_during_startup": "encoders are always unloaded once the caches are built; leave it out",
    "tread_config": "leave it out",
    "webhook_config": "a plugin with observation hooks (`docs/hooks.md`) can call out; leave it out",
}
"""Keys of the established trainer that this version knows but does not have -> what to do instead."""
LENGTHS = (
    ("max_train_steps", "num_train_epochs", "by epochs"),
    ("num_train_epochs", "max_train_steps", "by steps"),
)
"""A key that tells the length of a run, the other one, and what it means when the first is 0."""
SIZES = ("minimum_image_size", "maximum_image_size", "target_downsample_size")


def rename_run_keys(values: Mapping[str, Any], report: ConfigReport) -> dict[str, Any]:
    """Replace aliases by their canonical names."""
    result = dict(values)
    for alias, name in RUN_ALIASES.items():
        if alias not in result:
            continue
        value = result.pop(alias)
        if name in result and result[name] != value:
            problem = f"contradicts {name} = {result[name]!r}, which is the same key"
            report.refuse(alias, value, problem, f"keep {name} alone")
        result[name] = result.get(name, value)
        report.note(f"{alias} is read as {name} = {value}")
    for alias in [alias for alias in SWITCH_ALIASES if alias in result]:
        _unfold_switch(alias, result, report)
    return result


def _unfold_switch(alias: str, values: dict[str, Any], report: ConfigReport) -> None:
    """Replace a key that switches something on by those that do so, or by nothing where it is off."""
    value, keys = values.pop(alias), SWITCH_ALIASES[alias]
    switch = str(value).strip().lower()
    if switch not in ("true", "false"):
        report.refuse(alias, value, "is neither true nor false", "set true, or leave it out")
    if switch != "true":
        return
    for name, wanted in keys.items():
        given = values.setdefault(name, wanted)
        if str(given).lower() not in (str(wanted).lower(), "auto"):
            report.refuse(
                alias, value, f"contradicts {name} = {given!r}: it means {name} = {wanted}", "keep one of both"
            )
            return
    values.update(keys)
    report.note(f"{alias} is read as {', '.join(f'{name} = {wanted}' for name, wanted in keys.items())}")


def drop_zero_length(report: ConfigReport) -> None:
    """Leave out the one of the two lengths of a run that is 0 where the other is given, as other trainers write it."""
    values = report.layers.values
    for key, other, how in LENGTHS:
        if _is_zero(values.get(key)) and values.get(other) is not None and not _is_zero(values[other]):
            del values[key]
            report.note(f"{key} = 0 beside {other} = {values[other]}: the run's length is told {how}")


def _is_zero(value: Any) -> bool:
    return not isinstance(value, bool) and str(value).strip() in ("0", "0.0")


def refuse_not_yet(report: ConfigReport) -> None:
    """Refuse keys and values of the established trainer that this version does not support."""
    for key, instead in NOT_YET.items():
        value = report.layers.values.pop(key, None)
        if value not in (None, False, "", "none"):
            report.refuse(key, value, "is not in this version yet", instead)


def align_rounding(values: dict[str, Any], report: ConfigReport) -> None:
    """Convert an ``aspect_bucket_rounding`` above 9, which is an alignment in pixels."""
    rounding = values.get("aspect_bucket_rounding")
    try:
        means_alignment = not isinstance(rounding, bool) and float(rounding or 0) > 9
        alignment = values.get("aspect_bucket_alignment")
        contradicts = alignment is not None and float(alignment) != float(rounding or 0)
    except (TypeError, ValueError):  # refused by the fields' own types
        return
    if not means_alignment:
        return
    values.pop("aspect_bucket_rounding")
    if contradicts:
        problem = f"is above 9, so it is an alignment, and contradicts aspect_bucket_alignment = {alignment}"
        remedy = "keep aspect_bucket_alignment; rounding is 1 to 9 decimals"
        report.refuse("aspect_bucket_rounding", rounding, problem, remedy)
        return
    values["aspect_bucket_alignment"] = rounding
    report.note(
        f"aspect_bucket_rounding = {rounding} is above 9 decimals: read as aspect_bucket_alignment = {rounding} px"
    )


def rename_dataset_keys(values: dict[str, Any], aliases: Mapping[str, str], report: ConfigReport) -> None:
    """Replace other names of a backend's keys, and unfold the established trainer's objects with columns."""
    for name in METADATA_OBJECTS:
        table = values.get(name)
        if not isinstance(table, Mapping):
            continue
        del values[name]
        given = {METADATA_KEYS.get(key, key): value for key, value in table.items()}
        unfolded = {key: value for key, value in given.items() if key}
        _merge(values, unfolded, f"{name}.", report)
        report.note(f"{name} is read as {', '.join(sorted(unfolded)) or 'nothing'}")
    for alias, key in aliases.items():
        if alias in values:
            _merge(values, {key: values.pop(alias)}, "", report)
            report.note(f"{alias} is read as {key}")


def _merge(values: dict[str, Any], more: Mapping[str, Any], where: str, report: ConfigReport) -> None:
    for key, value in more.items():
        if values.setdefault(key, value) != value:
            problem = f"contradicts {report.prefix}{key} = {values[key]!r}, which is the same key"
            report.refuse(f"{where}{key}", value, problem, "keep one of them")


def rename_dataset_values(values: dict[str, Any], report: ConfigReport) -> None:
    """Replace other spellings of a dataset's values."""
    for (key, other), name in DATASET_VALUES.items():
        if values.get(key) == other:
            values[key] = name
            report.note(f"{key} = {other!r} is read as {name!r}")


def megapixel_notices(values: Any, prefix: str, notices: list[str]) -> None:
    """Add a notice of sizes that are megapixels although the unit is said to be pixels."""
    if values.resolution_type != "pixel":
        return
    sizes = [(key, getattr(values, key)) for key in SIZES]
    megapixels = [f"{key} = {value:g}" for key, value in sizes if value is not None and 0 < value < PIXEL_LIMIT]
    if megapixels:
        notices.append(
            f"{prefix}{', '.join(megapixels)}: below {PIXEL_LIMIT} under resolution_type pixel, read as megapixels"
        )


def convert_size(size: float, source: str, target: str) -> float:
    """Convert a size to another unit, exact for squares; edges in pixels, areas in megapixels."""
    if source == target or (source == "pixel" and size < PIXEL_LIMIT and target == "area"):
        return size
    edge = size**0.5 * 1000 if source == "area" or (source == "pixel" and size < PIXEL_LIMIT) else size
    return edge * edge / 1e6 if target == "area" else edge
