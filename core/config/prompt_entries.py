"""Entries of the data file that hold captions alone (``dataset_type: prompts``)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from .dataset_settings import DatasetSettings

if TYPE_CHECKING:
    from ..plugins import Registry

Refuse = Callable[[str, object, str, str], None]
ABOUT_PICTURES = (
    "crop", "crop_style", "minimum_image_size", "maximum_image_size", "target_downsample_size",
    "aspect_bucket_rounding", "minimum_aspect_ratio", "maximum_aspect_ratio", "max_upscale_threshold", "random_flip",
    "cache_dir_vae", "vae_batch_size",
)  # fmt: skip
"""Keys that decide what happens to pictures, hence nothing where there are none."""


def without_pictures(entry: DatasetSettings, given: Collection[str], notices: list[str]) -> DatasetSettings:
    """The entry with the keys that are about pictures at their defaults; those that were given are named in a notice.

    Args:
        entry: Of prompts.
        given: Keys that the entry itself has, rather than the run.
        notices: Where the notice goes.
    """
    defaults = {name: DatasetSettings.model_fields[name].default for name in ABOUT_PICTURES}
    idle = [name for name in ABOUT_PICTURES if name in given and getattr(entry, name) != defaults[name]]
    if idle:
        notices.append(f"data.{entry.id}: {', '.join(idle)}: no effect on prompts, which have no pictures")
    return entry.model_copy(update=defaults)


def check_kind(entry: DatasetSettings, refuse: Refuse) -> None:
    """Keys that fit the one kind of dataset only."""
    prefix = f"data.{entry.id}."
    if entry.has_pictures:
        for key in ("prompts_file", "caption_column"):
            value = getattr(entry, key)
            if value is not None:
                problem = "is for captions alone, and this entry is of dataset_type image"
                refuse(f"{prefix}{key}", str(value), problem, 'add "dataset_type": "prompts", or leave it out')
        return
    assert entry.backend is not None
    if entry.prompts_file is not None and "prompts_file" not in type(entry.backend).model_fields:
        remedy = "give the place of .txt files instead, or keep the file in a local folder (type local)"
        problem = f"is not read by the data backend {entry.type!r}"
        refuse(f"{prefix}prompts_file", str(entry.prompts_file), problem, remedy)
    if entry.crop_aspect != "square":
        remedy = "leave it out; for other sizes make entries with other resolutions"
        refuse(f"{prefix}crop_aspect", entry.crop_aspect, "prompts have no aspect ratio: must be 'square'", remedy)
    if entry.caption_strategy != "textfile":
        problem = "prompts stand in prompts_file or in the .txt files of instance_data_dir: must be 'textfile'"
        remedy = "leave it out; instance_prompt goes in front of all with prepend_instance_prompt"
        refuse(f"{prefix}caption_strategy", entry.caption_strategy, problem, remedy)


def check_prompts(entry: DatasetSettings, registry: Registry, refuse: Refuse) -> None:
    """The first prompts of a dataset can be read: file, suffix, column, encoding."""
    from ..data.prompt_files import open_source
    from ..errors import BadValue

    backend = registry.get("data_backend", entry.type)(entry.backend)
    source = open_source(backend, entry)
    try:
        source.identity()
        next((chunk for chunk in source.chunks() if chunk.keys), None)
    except BadValue as error:
        refuse(f"data.{entry.id}.{error.key}", error.value, error.problem, error.remedy)
