"""The paths of the indexes and caches of a configuration's datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..index.sequential import resume_points_path
from .mirror import RemoteCache

if TYPE_CHECKING:
    from ...registry.registry import Registry
    from ...settings.configuration import Configuration
    from ...settings.dataset_settings import DatasetSettings


class CachePaths:
    """The paths of indexes and caches: those that the data file names, else folders below `root`."""

    def __init__(self, config: Configuration, root: Path, registry: Registry | None = None) -> None:
        self._config, self._root, self._registry = config, root, registry
        self._remote: dict[str, RemoteCache] = {}
        self._caches: dict[str, DatasetSettings] = {entry.id: entry for entry in config.caches}

    def latents(self, settings: DatasetSettings) -> Path:
        """Return the folder of a dataset's latent caches."""
        if settings.cache_dir_vae is not None:
            return Path(settings.cache_dir_vae)
        return self.latents_root / settings.id

    @property
    def latents_root(self) -> Path:
        """The folder of the latents of all datasets that are given no folder of their own."""
        shared = self._latents_entry()
        return Path(shared.cache_dir) if shared is not None and shared.cache_dir is not None else self._root / "vae"

    def index(self, settings: DatasetSettings) -> Path:
        """Return the file of a dataset's index, which lies beside its latents where it has any."""
        folder = self.latents(settings) if settings.has_images else self._root / "prompts" / settings.id
        return folder / f"{settings.id}.index.arrow"

    def quarantine_list(self, settings: DatasetSettings) -> Path:
        """Return the text file that lists a dataset's broken files with reasons, for people."""
        return self.index(settings).with_name(f"{settings.id}.quarantine.txt")

    def quarantine_state(self, settings: DatasetSettings) -> Path:
        """Return the JSON file of the samples that could not be encoded, which resumed runs read."""
        return self.index(settings).with_name(f"{settings.id}.quarantine.json")

    def remembered(self, settings: DatasetSettings) -> Path:
        """Return the file with the settings that a dataset's latents were last made with."""
        return self.latents(settings) / f"{settings.id}.settings.json"

    def side_files(self, settings: DatasetSettings) -> list[Path]:
        """List the files that lie beside a dataset's caches."""
        index = self.index(settings)
        beside = [self.quarantine_list(settings), self.quarantine_state(settings), self.remembered(settings)]
        return [index, resume_points_path(index), *beside]

    def texts(self, settings: DatasetSettings) -> Path:
        """Return the folder of the text caches that a dataset uses."""
        entry = self.text_entry(settings)
        if entry is not None and entry.cache_dir is not None:
            return Path(entry.cache_dir)
        return self._root / "text" / (entry.id if entry is not None and entry.backend is not None else "")

    def _latents_entry(self) -> DatasetSettings | None:
        return next((entry for entry in self._caches.values() if entry.dataset_type == "vae_embeds"), None)

    def _remote_cache(self, entry: DatasetSettings | None) -> RemoteCache | None:
        """Return the remote cache that an entry names by having a backend of its own, else None."""
        if entry is None or entry.backend is None or self._registry is None:
            return None
        if entry.id not in self._remote:
            backend = self._registry.get("data_backend", entry.type)(entry.backend)
            self._remote[entry.id] = RemoteCache(entry.id, backend)
        return self._remote[entry.id]

    def remote_latents(self, settings: DatasetSettings) -> RemoteCache | None:
        """Return the remote copy of a dataset's latent cache, if there is one."""
        remote = self._remote_cache(self._latents_entry())
        return remote.within(settings.id) if remote is not None else None

    def remote_texts(self, settings: DatasetSettings) -> RemoteCache | None:
        """Return the remote copy of a dataset's text cache, if there is one."""
        return self._remote_cache(self.text_entry(settings))

    def text_entry(self, settings: DatasetSettings) -> DatasetSettings | None:
        """Return the text_embeds entry that a dataset uses."""
        return self._caches[settings.text_embeds] if settings.text_embeds else self._config.text_cache

    def trajectory_entry(self, settings: DatasetSettings) -> DatasetSettings:
        """Return the distillation cache that a dataset uses; the configuration gives it one where a method needs it."""
        assert settings.distillation_cache is not None, f"dataset {settings.id!r} has no distillation cache"
        return self._caches[settings.distillation_cache]

    def trajectories(self, entry: DatasetSettings) -> Path:
        """Return the folder of a distillation cache."""
        return Path(entry.cache_dir) if entry.cache_dir is not None else self._root / "trajectories" / entry.id

    def remote_trajectories(self, entry: DatasetSettings) -> RemoteCache | None:
        """Return the remote copy of a distillation cache, if there is one."""
        return self._remote_cache(entry)

    def text_shard_size(self, settings: DatasetSettings) -> int:
        """Return the number of captions per file of the text cache that a dataset uses."""
        return (self.text_entry(settings) or settings).write_batch_size


def dataset_folders(paths: CachePaths, datasets: Sequence[DatasetSettings]) -> list[Path]:
    """List every folder that may hold caches of `datasets`, each once."""
    folders = [folder(settings) for settings in datasets for folder in (paths.latents, paths.texts)]
    folders += [
        paths.trajectories(paths.trajectory_entry(each)) for each in datasets if each.distillation_cache is not None
    ]
    return list(dict.fromkeys(folders))
