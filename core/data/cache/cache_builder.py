"""The builder that brings the caches of all datasets up to date and says why anything is encoded anew."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...utils.disk import free_bytes
from ...utils.files import write_whole
from ...utils.memory import gigabytes
from ...utils.progress import TaskProgress
from ..dataset import Dataset
from ..report.summary import DataReport
from ..samples.images import PIXELS_VERSION
from .cache_paths import CachePaths
from .encode import Job, LatentEncoder, WorkerShard, encode_captions, missing_captions, without_embeddings
from .encode_sequential import SequentialEncoder
from .mirror import Mirror, RemoteCache
from .tensor_cache import TensorCache, cache_folders
from .trajectory_cache import CachedTrajectories, TrajectoryMaker, WantedTrajectories, cost, trajectory_descriptor

if TYPE_CHECKING:
    from ...plugin_api.family import ModelFamily

logger = logging.getLogger(__name__)
FORMAT = 1
PREPROCESSING = (
    "resolution", "resolution_type", "crop", "crop_aspect", "crop_style", "maximum_image_size",
    "target_downsample_size", "aspect_bucket_alignment", "aspect_bucket_rounding", "random_flip",
)  # fmt: skip
"""Settings that decide an image's pixels; they are compared to say why latents are made anew."""
MODEL_PARTS = {"vae": "autoencoder is", "denoiser": "teacher is", "text": "text encoders are"}


@dataclass
class Caches:
    """The caches of each dataset, by its id; datasets may share those of texts and trajectories."""

    latents: dict[str, TensorCache] = field(default_factory=dict)
    texts: dict[str, TensorCache] = field(default_factory=dict)
    trajectories: dict[str, CachedTrajectories] = field(default_factory=dict)


def text_descriptor(family: ModelFamily) -> dict[str, Any]:
    """Return everything that all embeddings of a cache depend on."""
    return {"kind": "text", "format": FORMAT, "family": family.name, "text": family.fingerprint("text")}


def latent_descriptor(family: ModelFamily, dataset: str) -> dict[str, Any]:
    """Return everything that all latents of a cache depend on."""
    return {"kind": "latents", "format": FORMAT, "family": family.name, "vae": family.fingerprint("vae"),
            "dataset": dataset, "pixels": PIXELS_VERSION}  # fmt: skip


class CacheBuilder:
    """Encodes the missing entries; the text encoders are released before the autoencoder loads.

    Args:
        family: The encoders.
        paths: Paths of the caches.
        shard: This process's part of the work.
        workers: Threads that decode images.
        progress: Reports every entry.
        synchronized: A block that all processes leave together, or with the error of the one that failed in it.
    """

    def __init__(
        self,
        family: ModelFamily,
        paths: CachePaths,
        *,
        shard: WorkerShard,
        workers: int,
        progress: TaskProgress,
        synchronized: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.family, self.paths, self.shard, self.workers = family, paths, shard, workers
        self.progress, self.synchronized = progress, synchronized

    def build(
        self, datasets: Sequence[Dataset], report: DataReport, *, images: bool = True, trajectories: bool = False
    ) -> Caches:
        """Return the complete caches; broken images are dropped from their datasets, and counts go into `report`.

        Args:
            datasets: The datasets that are trained on.
            report: Takes the counts.
            images: Whether latents are made; without, the autoencoder is not loaded.
            trajectories: Whether the teacher makes trajectories of the captions; without, it is not loaded.
        """
        caches = Caches()
        groups: dict[Path, list[Dataset]] = {}
        for dataset in datasets:
            groups.setdefault(self.paths.texts(dataset.settings), []).append(dataset)
        for folder, group in groups.items():
            cache = self._texts(folder, group, report)
            cache.release_lookup()  # before that of the latents is made
            caches.texts |= {dataset.id: cache for dataset in group}
        for dataset in datasets:
            dataset.check_not_empty()  # before the next encoder loads for nothing
        for dataset in datasets if images else ():
            caches.latents[dataset.id] = self._latents(dataset, report)
        maker = TrajectoryMaker(self.family, progress=self.progress)
        for dataset in datasets if trajectories else ():
            caches.trajectories[dataset.id] = self._trajectories(dataset, caches.texts[dataset.id], maker, report)
        return caches

    # -- captions ---------------------------------------------------------------------------------------------------

    def _texts(self, folder: Path, datasets: Sequence[Dataset], report: DataReport) -> TensorCache:
        remote = self.paths.remote_texts(datasets[0].settings)
        cache = self._open(folder, text_descriptor(self.family), "text cache", remote, report)
        todo = missing_captions(cache, datasets)
        missing = sum(len(positions) for _, positions in todo)
        if missing:
            self._explain_texts(folder, cache, missing)
            with self.synchronized():
                encode_captions(
                    cache, todo, self.family, shard_size=self.paths.text_shard_size(datasets[0].settings),
                    progress=self.progress, shard=self.shard,
                )  # fmt: skip
            self.family.release_encoders()
            report.captions_encoded += missing
            cache = self._reload(cache)
        for dataset in datasets:
            if broken := without_embeddings(cache, dataset):
                dataset.drop(broken)
        return cache

    def _explain_texts(self, folder: Path, cache: TensorCache, missing: int) -> None:
        if len(cache):
            logger.info(f"text cache: {missing:,} captions are new or have changed and are encoded")
        elif any(descriptor["kind"] == "text" for path, descriptor in cache_folders(folder) if path != cache.folder):
            logger.info(f"text cache: the text encoders have changed, so all {missing:,} captions are encoded anew")

    # -- images ---------------------------------------------------------------------------------------------------

    def _latents(self, dataset: Dataset, report: DataReport) -> TensorCache:
        folder = self.paths.latents(dataset.settings)
        remote, label = self.paths.remote_latents(dataset.settings), f"latents of {dataset.id!r}"
        cache = self._open(folder, latent_descriptor(self.family, dataset.id), label, remote, report)
        encoder = self._encoder(dataset, cache)
        jobs = encoder.plan()
        missing = sum(len(job.rows) for job in jobs)
        if missing:
            self._explain_latents(dataset, cache, missing)
            self._require_room(cache, sum(self._latent_bytes(dataset, job) for job in jobs))
            with self.synchronized():
                encoder.run(encoder.own_jobs(jobs, self.shard), progress=self.progress)
            self.family.release_encoders()
            report.images_encoded += missing
            cache = self._reload(cache)
            encoder = self._after(encoder, cache)
        if encoder.broken:
            dataset.drop(encoder.broken)
        with self.synchronized():
            if self.shard.rank == 0:
                self._remember(dataset)
        return cache

    def _latent_bytes(self, dataset: Dataset, job: Job) -> int:
        """Return about how many bytes the latents of a job take, in float32."""
        width, height = (edge // self.family.scale_factor for edge in dataset.shapes[job.bucket])
        return 4 * len(job.rows) * self.family.latent_channels * width * height

    def _require_room(self, cache: TensorCache, num_bytes: int) -> None:
        """Raise UserError where there is no room for the latents, before the autoencoder is loaded."""
        with self.synchronized():
            free = free_bytes(cache.parent)
            if self.shard.rank == 0 and num_bytes > free:
                needed = f"{cache.label} need about {gigabytes(num_bytes)}"
                raise UserError(
                    f"{needed}, and {gigabytes(free)} are free in {cache.parent}",
                    "free some room, or name a folder on another disk: cache_dir_vae",
                )

    def _encoder(self, dataset: Dataset, cache: TensorCache) -> LatentEncoder:
        kind = SequentialEncoder if dataset.in_order else LatentEncoder
        return kind(dataset, cache, self.family, workers=self.workers)

    def _after(self, encoder: LatentEncoder, cache: TensorCache) -> LatentEncoder:
        """Find the broken images as all processes see them: known failures, and everything that is still missing."""
        final = self._encoder(encoder.dataset, cache)
        left = final.plan()
        for job in left:
            for row in job.rows:
                final.broken[int(row)] = encoder.broken.get(int(row), "it could not be read")
        return final

    def _settings(self, dataset: Dataset) -> dict[str, Any]:
        values = dataset.settings.model_dump(mode="json", include=set(PREPROCESSING))
        return {"vae": self.family.fingerprint("vae"), **{name: values[name] for name in PREPROCESSING}}

    def _remember(self, dataset: Dataset) -> None:
        path, text = self.paths.remembered(dataset.settings), json.dumps(self._settings(dataset), indent=1)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text.encode())

    def _explain_latents(self, dataset: Dataset, cache: TensorCache, missing: int) -> None:
        path = self.paths.remembered(dataset.settings)
        changes = changed(json.loads(path.read_bytes()), self._settings(dataset)) if path.exists() else []
        if changes:
            logger.info(f"{cache.label}: {', '.join(changes)}, so {missing:,} images are encoded anew")
        elif len(cache):
            known = f"{len(cache):,} are there"
            logger.info(f"{cache.label}: {known}, {missing:,} new, changed or missing ones are encoded")

    # -- trajectories of the teacher ------------------------------------------------------------------------------

    def _trajectories(
        self, dataset: Dataset, texts: TensorCache, maker: TrajectoryMaker, report: DataReport
    ) -> CachedTrajectories:
        settings = self.paths.trajectory_entry(dataset.settings)
        folder, descriptor = self.paths.trajectories(settings), trajectory_descriptor(self.family, settings)
        remote = self.paths.remote_trajectories(settings)
        cache = self._open(folder, descriptor, f"trajectories of {settings.id!r}", remote, report)
        wanted = WantedTrajectories(dataset, settings)
        jobs = wanted.missing(cache)
        missing = sum(len(job.keys) for job in jobs)
        if missing:
            self._explain_trajectories(cache)
            logger.info(cost(settings, missing, wanted.num_trajectories))
            with self.synchronized():
                maker.run(wanted, self.shard.of(jobs), cache, texts)
            maker.release()
            self.family.release_encoders()
            report.trajectories_made += missing
            cache = self._reload(cache)
        return wanted.cached(cache, self.family)

    def _explain_trajectories(self, cache: TensorCache) -> None:
        others = [found for _, found in cache_folders(cache.parent) if found["kind"] == cache.descriptor["kind"]]
        if not len(cache) and others:
            differences = min((changed(other, cache.descriptor) for other in others), key=len)
            logger.info(f"{cache.label}: {', '.join(differences)}, so they are made anew")

    # -- all of them --------------------------------------------------------------------------------------------------

    def _open(
        self, folder: Path, descriptor: Mapping[str, Any], label: str, remote: RemoteCache | None, report: DataReport
    ) -> TensorCache:
        """Open the cache, which the first process checks before the others read it."""
        cache = TensorCache(folder, descriptor, label=label)
        if remote is not None:
            cache.mirror = Mirror(remote.within(cache.folder.name), cache.folder, progress=self.progress)
        with self.synchronized():
            if self.shard.rank == 0:
                report.damaged_shards += _load(cache)
        with self.synchronized():  # nobody writes before all have seen the same
            if self.shard.rank != 0:
                cache.load()
        return cache

    def _reload(self, cache: TensorCache) -> TensorCache:
        """Load the cache again, with the entries that all processes have added."""
        with self.synchronized():
            if cache.mirror is not None:
                cache.mirror.flush()
            cache.load()
        return cache


def _load(cache: TensorCache) -> int:
    """Load a cache, first filled from its remote copy if it has one; return the number of its damaged shards."""
    if cache.mirror is None:
        return len(cache.load())
    cache.mirror.pull()
    damaged = len(cache.load())
    cache.mirror.push_missing()
    return damaged


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the settings that differ, as ``resolution 512 -> 1024``."""
    different = [name for name in now if before.get(name) != now[name]]
    return [
        f"the {MODEL_PARTS[name]} another one" if name in MODEL_PARTS else f"{name} {before.get(name)} -> {now[name]}"
        for name in different
    ]
