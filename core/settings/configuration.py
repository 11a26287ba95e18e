"""The validated configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..errors import UserError
from ..utils import redaction
from ..utils.prompt_library import read_library
from .dataset_settings import DatasetSettings
from .run_settings import RunSettings
from .secrets import without_secrets

PARTS = {
    "distillation_config": "method",
    "family_config": "family",
    "optimizer_config": "optimizer",
    "quantizer_config": "quantizer",
    "tracker_config": "tracker",
    "evaluator_config": "evaluator",
    "publisher_config": "publisher",
}
"""Keys whose values belong to plugins -> the kind of plugin; nested by the plugin's name."""


@dataclass(frozen=True)
class Configuration:
    """Everything that decides a run, validated, with defaults filled in.

    Attributes:
        run: The keys of the run.
        method: Validated ``Config`` of the chosen method.
        family: Validated ``Config`` of the chosen family.
        optimizer: Validated ``Config`` of the chosen optimizer.
        quantizers: Name -> validated ``Config`` of each quantizer that a ``..._precision`` key names.
        trackers: Name -> validated ``Config`` of each tracker of ``report_to``.
        evaluators: Name -> validated ``Config`` of each registered evaluator (or of those named by ``evaluators``).
        publishers: Name -> validated ``Config`` of each publisher asked for.
        datasets: The enabled datasets of images or prompts, run defaults applied.
        caches: The enabled entries of caches, the default text cache included.
        text_cache: The default text_embeds entry, or None (then a cache is made under output_dir).
        notices: A line for each value that was normalised and everything else that the user should know.
        miniature: Whether the model is the family's shipped one.
        miniature_named: Whether it is so because it was named; else no model was.
        plugin_files: Plugin files of command line and configuration.
    """

    run: RunSettings
    method: BaseModel
    family: BaseModel
    optimizer: BaseModel
    trackers: Mapping[str, BaseModel]
    evaluators: Mapping[str, BaseModel]
    publishers: Mapping[str, BaseModel]
    datasets: tuple[DatasetSettings, ...]
    caches: tuple[DatasetSettings, ...] = ()
    text_cache: DatasetSettings | None = None
    notices: tuple[str, ...] = ()
    miniature: bool = False
    miniature_named: bool = False
    plugin_files: tuple[Path, ...] = ()
    quantizers: Mapping[str, BaseModel] = field(default_factory=dict)

    @property
    def largest_batch(self) -> int:
        """The number of samples of the largest micro-batch that any dataset gives a process."""
        sizes = [entry.train_batch_size or self.run.train_batch_size for entry in self.datasets]
        return max(sizes, default=self.run.train_batch_size)

    @property
    def distillation_caches(self) -> tuple[DatasetSettings, ...]:
        """The distillation caches that datasets name."""
        named = {entry.distillation_cache for entry in self.datasets}
        return tuple(entry for entry in self.caches if entry.id in named)

    @property
    def validation_prompts(self) -> tuple[str, ...]:
        """The prompts of ``validation_prompt``, then those of the library file, each once."""
        library = self.run.validation_prompt_library
        return tuple(dict.fromkeys([*self.run.validation_prompt, *(read_library(library))]))

    def resolved(self) -> dict[str, Any]:
        """Return the complete configuration, JSON-able and without secrets; loading it again reproduces the run."""
        run = self.run
        named: dict[str, dict[str, BaseModel]] = {
            "distillation_config": {run.distillation_method: self.method},
            "family_config": {run.model_family: self.family},
            "optimizer_config": {run.optimizer: self.optimizer},
            "quantizer_config": dict(self.quantizers),
            "tracker_config": dict(self.trackers),
            "evaluator_config": dict(self.evaluators),
            "publisher_config": dict(self.publishers),
        }
        resolved = run.model_dump(mode="json")
        resolved["overwrite"] = False  # else resuming from the resolved file would begin by deleting the run
        resolved["plugins"] = [str(path) for path in self.plugin_files]
        resolved["validation_resolution"] = ",".join(f"{w}x{h}" for w, h in run.validation_resolution) or None
        for key, parts in named.items():
            resolved[key] = {name: without_secrets(part) for name, part in parts.items()}
        resolved["data"] = [dump_dataset(entry) for entry in (*self.datasets, *self.caches)]
        return redaction.without_secrets(resolved)


def dump_dataset(entry: DatasetSettings) -> dict[str, Any]:
    """Return an entry of the data file as it would be written in full."""
    own = without_secrets(entry.backend) if entry.backend is not None else {}
    return {**own, **without_secrets(entry)}


def default_resolution(configuration: Configuration) -> tuple[int, int]:
    """Return (width, height) in pixels of images: the first validation resolution, else a square of the first
    dataset's.
    """
    run = configuration.run
    if run.validation_resolution:
        return run.validation_resolution[0]
    if not configuration.datasets:
        raise UserError("there is no dataset to take a resolution from", "set validation_resolution=1024x1024")
    return data_resolution(configuration)


def data_resolution(configuration: Configuration) -> tuple[int, int]:
    """Return (width, height) in pixels of a square image of the first dataset."""
    dataset = configuration.datasets[0]
    multiple = dataset.aspect_bucket_alignment
    edge = max(1, round(dataset.square_edge / multiple)) * multiple
    return edge, edge
