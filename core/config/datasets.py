"""The data file: how it is found, read, checked and filled with the run's defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..errors import BadValue, Finding
from ..plugin_api.backend import SampleBackend
from ..settings.dataset_settings import DatasetSettings
from ..settings.run_settings import RunSettings
from ..utils import packages
from ..utils.suggest import did_you_mean
from .checks import check_dataset, check_folder, check_weights
from .coercion import absolute
from .findings import PartCheck
from .normalise import (
    SIZES,
    align_rounding,
    convert_size,
    megapixel_notices,
    rename_dataset_keys,
    rename_dataset_values,
)
from .parsing import SUFFIXES, read_file
from .prompt_entries import check_captions, check_kind, check_prompts, without_images
from .reading import COMMAND_LINE, ConfigReport, Layers, Origin, fill_environment, strip_dashes
from .trajectory_entries import check_trajectory_keys

if TYPE_CHECKING:
    from ..registry.registry import Registry

DATA_FILE_STEM = "multidatabackend"
TRAINED_ON = ("image", "prompts")
"""Values of ``dataset_type`` whose entries hold samples."""
NAMED_CACHES = ("text_embeds", "distillation_cache")
"""Values of ``dataset_type`` of caches that a dataset may name, by a key that is called the same."""
INHERITED = (
    "aspect_bucket_alignment",
    "aspect_bucket_rounding",
    "random_flip",
    "micro_conditioning",
    "caption_dropout_probability",
    "vae_batch_size",
)


@dataclass
class RawEntry:
    """One entry of the data file as read, with the origin of each key."""

    layers: Layers
    index: int

    @property
    def id(self) -> str:
        """The entry's id, or its index in the list where it has none."""
        name = self.layers.values.get("id")
        return str(name) if name else f"[{self.index}]"

    @property
    def prefix(self) -> str:
        """The prefix of its keys in messages."""
        return f"data.{self.id}."


@dataclass
class Datasets:
    """The checked entries: enabled datasets of images or prompts, and caches."""

    training: list[DatasetSettings] = field(default_factory=list)
    caches: list[DatasetSettings] = field(default_factory=list)

    @property
    def text_cache(self) -> DatasetSettings | None:
        """The default text cache, or the only one there is."""
        entries = [entry for entry in self.caches if entry.dataset_type == "text_embeds"]
        chosen = [entry for entry in entries if entry.default] or (entries if len(entries) == 1 else [])
        return chosen[0] if chosen else None


def find_data_file(config_file: Path | None, output_dir: Path | None) -> Path | None:
    """Find ``multidatabackend.*`` beside the configuration, in output_dir or in the working directory."""
    folders = [folder for folder in (config_file.parent if config_file else None, output_dir, Path.cwd()) if folder]
    for folder in folders:
        for suffix in SUFFIXES:
            candidate = folder / f"{DATA_FILE_STEM}{suffix}"
            if os.path.isfile(candidate):
                return candidate
    return None


def read_entries(content: Any, origin: Origin, findings: list[Finding]) -> list[RawEntry]:
    """Return the entries of a data file's content."""
    if isinstance(content, Mapping) and set(content) == {"data"}:
        content = content["data"]  # TOML has no list at the top
    if not isinstance(content, list):
        problem = f"is {_kind(content)}, not a list of datasets"
        findings.append(
            Finding(origin.file, "data", content, problem, 'write [{"id": "...", "instance_data_dir": "..."}]')
        )
        return []
    entries = []
    for index, item in enumerate(content):
        if not isinstance(item, Mapping):
            problem = f"is {_kind(item)}, not an object"
            findings.append(Finding(origin.file, f"data[{index}]", item, problem, 'write {"id": "...", ...}'))
            continue
        entry = RawEntry(Layers(fallback=origin), index)
        entry.layers.add(strip_dashes(item, origin.file, findings), origin)
        entry.layers.values = fill_environment(entry.layers.values, origin.file, f"data.{entry.id}", findings)
        entries.append(entry)
    return entries


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a value")


def read_data_file(path: Path, findings: list[Finding]) -> list[RawEntry]:
    """Read the entries of a data file."""
    before = len(findings)
    content = read_file(path, findings, what="--data")
    return [] if len(findings) > before else read_entries(content, Origin(str(path), path.parent.absolute()), findings)


def apply_overrides(
    entries: Sequence[RawEntry], overrides: Sequence[tuple[tuple[str, ...], Any]], findings: list[Finding]
) -> None:
    """Apply ``data.<id>.<key>=value`` of the command line to the entries; ids may contain dots."""
    origin = Origin(COMMAND_LINE, Path.cwd())
    for path, value in overrides:
        dotted = ".".join(path[1:])
        matches = [entry for entry in entries if dotted.startswith(f"{entry.id}.")]
        if not matches:
            ids = [entry.id for entry in entries]
            hint = did_you_mean(path[1], ids) if len(path) > 1 else ""
            remedy = f"{hint}ids: {', '.join(ids) or 'none, there is no data file'}"
            problem = "names no dataset and key: write data.<id>.<key>=<value>"
            findings.append(Finding(COMMAND_LINE, ".".join(path), value, problem, remedy))
            continue
        entry = max(matches, key=lambda entry: len(entry.id))
        key = dotted.removeprefix(f"{entry.id}.")
        filled = fill_environment(value, COMMAND_LINE, f"{entry.prefix}{key}", findings)
        entry.layers.add({key: filled}, origin)


class DatasetsCheck:
    """The check that turns raw entries into settings."""

    def __init__(
        self,
        registry: Registry,
        run: RunSettings,
        findings: list[Finding],
        notices: list[str],
        *,
        to_train: bool = True,
    ) -> None:
        self.registry = registry
        self.run = run
        self.to_train = to_train
        self.findings = findings
        self.notices = notices

    def check(self, entries: Sequence[RawEntry]) -> Datasets:
        """Check every entry; disabled ones are left out afterwards."""
        self._check_ids(entries)
        result = Datasets()
        for raw in entries:
            entry = self._entry(raw)
            if entry is None or entry.disabled:
                continue
            if entry.dataset_type in TRAINED_ON:
                self._check_entry(raw, entry)
                result.training.append(entry)
            else:
                self._check_cache(raw, entry)
                result.caches.append(entry)
        self._check_caches(entries, result)
        check_weights(result.training, entries[0].layers.fallback.file if entries else "", self.findings)
        return result

    def _check_entry(self, raw: RawEntry, entry: DatasetSettings) -> None:
        report, before = self._report(raw), len(self.findings)
        megapixel_notices(entry, f"data.{entry.id}: ", self.notices)
        check_dataset(entry, report)
        check_kind(entry, report)
        check_folder(entry, report)
        backend = self.registry.get("data_backend", entry.type)
        check_captions(entry, report, with_samples=issubclass(backend, SampleBackend))
        if self.to_train:
            self._check_place(entry, report)
            if not entry.has_images and len(self.findings) == before:
                check_prompts(entry, self.registry, report)

    def _check_cache(self, raw: RawEntry, entry: DatasetSettings) -> None:
        """Check that a cache's backend can be written to, and that its folder or bucket is usable."""
        kind = self.registry.get("data_backend", entry.type)
        if issubclass(kind, SampleBackend):
            remedy = "keep caches in a folder (type local) or a bucket"
            self._report(raw).refuse("type", entry.type, "is only read, so no cache can lie there", remedy)
        elif not kind.on_this_machine:
            self._check_place(entry, self._report(raw))

    def _check_place(self, entry: DatasetSettings, report: ConfigReport) -> None:
        """Let the backend check its folder, files or bucket, as far as it can without the network."""
        try:
            backend = self.registry.get("data_backend", entry.type)(entry.backend)
            backend.check()
            if isinstance(backend, SampleBackend):
                backend.check_samples(images=entry.has_images, captions=entry.needs_captions)
            elif entry.metadata_is_here:
                from ..data.tables.metadata_table import MetadataTable

                MetadataTable(entry, backend).check()
        except BadValue as error:
            remedy = error.remedy.replace("data.<id>.", f"data.{entry.id}.")
            report.refuse(error.key, error.value, error.problem, remedy)
        except OSError as error:
            place, problem = error.filename or entry.id, f"cannot be read: {error.strerror or error}"
            report.refuse("type", entry.type, f"{place} {problem}", "check the entry's paths and their permissions")

    def _report(self, raw: RawEntry) -> ConfigReport:
        return ConfigReport(raw.layers, self.findings, self.notices, raw.prefix)

    def _check_ids(self, entries: Sequence[RawEntry]) -> None:
        seen: dict[str, int] = {}
        for raw in entries:
            if raw.id in seen:
                problem = f"stands twice: entries {seen[raw.id] + 1} and {raw.index + 1} of the list"
                self._report(raw).refuse("id", raw.id, problem, "give each dataset an id of its own")
            seen.setdefault(raw.id, raw.index)

    def _entry(self, raw: RawEntry) -> DatasetSettings | None:
        values = raw.layers.values
        report = self._report(raw)
        align_rounding(values, report)
        rename_dataset_values(values, report)
        backend = self._backend(raw)
        aliases = self.registry.get("data_backend", values.get("type", "local")).key_aliases if backend else {}
        rename_dataset_keys(values, aliases, report)
        own = set(backend.model_fields) if backend else set()
        settings = {
            key: value for key, value in values.items() if key in DatasetSettings.model_fields or key not in own
        }
        settings.pop("backend", None)
        if "backend" in values:
            report.refuse("backend", values["backend"], "is not a known key", "did you mean 'type'?")
        check = PartCheck(self.findings)
        origin = raw.layers.origin
        inherited = self._inherited(values)
        entry = check.validate(DatasetSettings, {**inherited, **settings}, raw.prefix, origin, known=own)
        if not isinstance(entry, DatasetSettings) or backend is None:
            return None
        ours = {key: value for key, value in values.items() if key in own}
        entry = check_trajectory_keys(entry, set(settings), report)
        kind = self.registry.get("data_backend", entry.type)
        if entry.dataset_type not in (*TRAINED_ON, "checkpoints") and kind.on_this_machine:
            return self._writable(entry)  # a cache on this machine lies in its cache_dir
        part = check.validate(backend, ours, raw.prefix, origin)
        if part is None:
            return None
        if not entry.has_images:
            entry = without_images(entry, set(settings), self.notices)
        return self._writable(entry.model_copy(update={"backend": part}))

    def _backend(self, raw: RawEntry) -> type[BaseModel] | None:
        name, report = raw.layers.values.get("type", "local"), self._report(raw)
        if not isinstance(name, str) or not self.registry.known("data_backend", name):
            remedy = self.registry.remedy("data_backend", str(name))
            report.refuse("type", name, "is not a registered data backend", remedy)
            return None
        found = self.registry.get("data_backend", name)
        if found.name != name:
            raw.layers.values["type"] = found.name
            report.note(f"type = {name!r} is read as {found.name!r}")
        absent = list(packages.problems(found.packages))
        for problem, remedy in absent:
            report.refuse("type", found.name, problem, remedy)
        return None if absent else found.Config

    def _inherited(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the run's defaults, with sizes converted into the entry's unit."""
        run = self.run
        unit = values.get("resolution_type", run.resolution_type)
        known = unit in ("pixel", "area", "pixel_area")
        result: dict[str, Any] = {name: getattr(run, name) for name in INHERITED}
        result["resolution_type"] = run.resolution_type
        for name in ("resolution", *SIZES):
            size = getattr(run, name)
            if size is not None:
                result[name] = convert_size(size, run.resolution_type, unit) if known else size
        if "maximum_image_size" in values:
            result.pop("target_downsample_size", None)
        return result

    def _writable(self, entry: DatasetSettings) -> DatasetSettings:
        """Move cache folders that cannot be made under output_dir, with a notice: nothing is lost by it."""
        for key in ("cache_dir_vae", "cache_dir"):
            folder = getattr(entry, key)
            if folder is not None and not folder.exists() and not can_be_made(folder):
                self.notices.append(f"data.{entry.id}.{key} = {folder} cannot be made: the cache goes under output_dir")
                entry = entry.model_copy(update={key: None})
        return entry

    def _check_caches(self, entries: Sequence[RawEntry], result: Datasets) -> None:
        for kind in NAMED_CACHES:
            caches = [entry for entry in result.caches if entry.dataset_type == kind]
            defaults = [entry.id for entry in caches if entry.default]
            if len(defaults) > 1:
                raw = next(raw for raw in entries if raw.id == defaults[1])
                problem = f"is set for {', '.join(defaults)}, and only one {kind} entry can be the default"
                self._report(raw).refuse("default", True, problem, "keep it on one of them")
            for entry in result.training:
                named = getattr(entry, kind)
                if named is not None and named not in [cache.id for cache in caches]:
                    raw = next(raw for raw in entries if raw.id == entry.id)
                    remedy = f"{kind} entries: {', '.join(cache.id for cache in caches) or 'none'}"
                    self._report(raw).refuse(kind, named, f"is not the id of a {kind} entry", remedy)


def can_be_made(folder: Path) -> bool:
    """Return whether the nearest existing parent lets a folder be made in it."""
    parent = absolute(str(folder), Path.cwd())
    while not os.path.exists(parent):
        parent = parent.parent
    return parent.is_dir() and os.access(parent, os.W_OK)
