"""Checks of data file entries that hold captions alone (``dataset_type: prompts``)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..settings.dataset_settings import COLUMN_KEYS, OF_A_TABLE, OF_THE_SOURCE, DatasetSettings
from .reading import ConfigReport

if TYPE_CHECKING:
    from ..registry.registry import Registry

ABOUT_IMAGES = (
    "crop", "crop_style", "minimum_image_size", "maximum_image_size", "target_downsample_size",
    "aspect_bucket_rounding", "minimum_aspect_ratio", "maximum_aspect_ratio", "max_upscale_threshold", "random_flip",
    "cache_dir_vae", "vae_batch_size", "micro_conditioning",
)  # fmt: skip
"""Keys that decide what happens to images, without effect where there are none."""


def without_images(entry: DatasetSettings, given: Collection[str], notices: list[str]) -> DatasetSettings:
    """Return the entry with the keys about images at their defaults; those that were given are named in a notice.

    Args:
        entry: An entry of prompts.
        given: Keys that the entry itself has, rather than the run.
        notices: Takes the notice.
    """
    defaults = {name: DatasetSettings.model_fields[name].default for name in ABOUT_IMAGES}
    idle = [name for name in ABOUT_IMAGES if name in given and getattr(entry, name) != defaults[name]]
    if idle:
        notices.append(f"data.{entry.id}: {', '.join(idle)}: no effect on prompts, which have no images")
    return entry.model_copy(update=defaults)


def check_kind(entry: DatasetSettings, report: ConfigReport) -> None:
    """Refuse keys that fit the other kind of dataset only."""
    if entry.has_images:
        if entry.prompts_file is not None:
            problem = "is for captions alone, and this entry is of dataset_type image"
            remedy = 'add "dataset_type": "prompts", or leave it out'
            report.refuse("prompts_file", str(entry.prompts_file), problem, remedy)
        return
    assert entry.backend is not None
    if entry.prompts_file is not None and "prompts_file" not in type(entry.backend).model_fields:
        remedy = "give the place of .txt files instead, or keep the file in a local folder (type local)"
        problem = f"is not read by the data backend {entry.type!r}"
        report.refuse("prompts_file", str(entry.prompts_file), problem, remedy)
    if entry.crop_aspect != "square":
        remedy = "leave it out; for other sizes make entries with other resolutions"
        report.refuse("crop_aspect", entry.crop_aspect, "prompts have no aspect ratio: must be 'square'", remedy)


def check_captions(entry: DatasetSettings, report: ConfigReport, *, with_samples: bool) -> None:
    """Refuse sources of captions, sizes and columns that the entry cannot have.

    Args:
        entry: One enabled dataset.
        report: Takes findings.
        with_samples: Whether its backend's samples come with their captions.
    """
    table = entry.has_images and not with_samples
    if entry.metadata_file is not None and not table:
        problem = "is a table beside image files, and this entry has none"
        report.refuse("metadata_file", entry.metadata_file, problem, "leave it out: captions come with the samples")
    if entry.caption_strategy not in _strategies(entry, with_samples=with_samples):
        _refuse_strategy(entry, report, with_samples=with_samples)
    if table and entry.metadata_backend != "discovery" and not entry.sizes_in_table:
        problem = "takes sizes from a table, and none is named"
        remedy = 'add "metadata_file": "metadata.parquet", or leave it out: sizes are then read from the images'
        report.refuse("metadata_backend", entry.metadata_backend, problem, remedy)
    if entry.metadata_file is None:
        _check_columns(entry, report)


def _strategies(entry: DatasetSettings, *, with_samples: bool) -> Collection[str]:
    if with_samples:
        return ("textfile", *OF_THE_SOURCE, *(("filename", "instanceprompt") if entry.has_images else ()))
    if not entry.has_images:
        return ("textfile",)
    return ("textfile", "filename", "instanceprompt", *(OF_A_TABLE if entry.metadata_file is not None else ()))


def _refuse_strategy(entry: DatasetSettings, report: ConfigReport, *, with_samples: bool) -> None:
    if not entry.has_images:
        where = "with the samples" if with_samples else "in prompts_file or in the .txt files of instance_data_dir"
        problem = f"prompts stand {where}: must be 'textfile'"
        remedy = "leave it out; instance_prompt goes in front of all with prepend_instance_prompt"
    elif entry.caption_strategy in OF_A_TABLE:
        problem = f"takes captions from a table, and {entry.type!r} has image files and no table"
        remedy = (
            'name the table that lies beside them, as "metadata_file": "metadata.jsonl"; or set type to the table\'s'
        )
    else:
        problem = f"takes captions from samples that come with them, and those of {entry.type!r} do not"
        remedy = "set type to it as well, or caption_strategy to textfile"
    report.refuse("caption_strategy", entry.caption_strategy, problem, remedy)


def _check_columns(entry: DatasetSettings, report: ConfigReport) -> None:
    """Refuse names of columns where there is no table."""
    known = type(entry.backend).model_fields if entry.backend is not None else {}
    of_prompts = ("caption_column", "fallback_caption_column") if entry.prompts_file is not None else ()
    for key in COLUMN_KEYS:
        value = getattr(entry, key)
        if value and key not in known and key not in of_prompts:
            problem = "names a column, and this entry has no table"
            remedy = (
                'name the table as metadata_file, add "dataset_type": "prompts" with a prompts_file, or leave it out'
            )
            report.refuse(key, list(value) if isinstance(value, tuple) else value, problem, remedy)


def check_prompts(entry: DatasetSettings, registry: Registry, report: ConfigReport) -> None:
    """Read the first prompts of a dataset to check file, suffix, column and encoding."""
    from ..data.index.prompt_files import open_source
    from ..errors import BadValue

    backend = registry.get("data_backend", entry.type)(entry.backend)
    source = open_source(backend, entry)
    try:
        source.identity()
        next((chunk for chunk in source.chunks() if chunk.keys), None)
    except BadValue as error:
        report.refuse(error.key, error.value, error.problem, error.remedy)
