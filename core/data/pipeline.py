"""The data path of a run: backend -> index -> buckets -> caches -> batches."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..engine.processes import in_group, synchronized
from ..plugin_api.batch import Batch
from ..utils.files import write_whole
from ..utils.progress import TaskProgress, default_progress
from ..utils.seeds import derive_seed
from ..utils.threads import threads
from .cache.cache_builder import CacheBuilder, Caches
from .cache.cache_paths import CachePaths, dataset_folders
from .cache.encode import WorkerShard, ahead, flips
from .cache.trajectory_cache import trajectory_descriptor
from .cache.verify import CacheState, cache_states, folders_beside, needs
from .dataset import Dataset
from .hashing import permute
from .index.index import Index
from .index.index_builder import IndexBuilder
from .index.prompt_files import open_source
from .index.prompt_index import PromptIndexBuilder
from .index.sequential import Opener
from .loader import IMAGES_ALONE, BatchContents, BatchLayout, BatchLoader, CachedDataset, CachedLatents, Prefetch
from .order import Curriculum, Stream
from .report.buckets import small_buckets, unused_buckets
from .report.cut_captions import cut_captions
from .report.dataset_report import DatasetReport, write_reports
from .report.summary import DataReport, describe, named_with_reasons
from .samples.captions import CaptionRules
from .samples.geometry import Geometry
from .samples.images import BrokenImage, fit

if TYPE_CHECKING:
    from ..plugin_api.backend import DataBackend
    from ..plugin_api.family import ModelFamily
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..settings.dataset_settings import DatasetSettings

logger = logging.getLogger(__name__)


class DataPipeline:
    """The whole data path, from the data file to batches.

    Args:
        config: The run's configuration.
        registry: Finds backends by name.
        family: Encodes captions and images; its fingerprints are part of the cache keys.
        layout: Samples per micro-batch, micro-batches per step, and this process's place among all.
        contents: Which tensors batches carry.
        seed: Decides the order and all random draws.
        cache_root: Folder for caches that the data file gives no folder.
        progress: How long work tells of itself; by default a bar in a terminal, plain lines elsewhere.
        resumes: Whether a run is resumed: samples that were quarantined when it began stay out.
    """

    def __init__(
        self,
        config: Configuration,
        registry: Registry,
        family: ModelFamily,
        *,
        layout: BatchLayout,
        contents: BatchContents = IMAGES_ALONE,
        seed: int,
        cache_root: Path,
        progress: TaskProgress | None = None,
        resumes: bool = False,
    ) -> None:
        assert not contents.images or all(each.has_images for each in config.datasets)  # refused before
        self._contents, self._layout, self._resumes = contents, layout, resumes
        self._config, self._registry, self._family = config, registry, family
        self._seed, self._paths = seed, CachePaths(config, cache_root, registry)
        self._progress = progress or default_progress()
        self._datasets: list[Dataset] = []
        self._loader: BatchLoader | None = None
        self._open: list[Prefetch[list[Batch]]] = []

    # -- before the first step --------------------------------------------------------------------------------------

    def prepare(self) -> DataReport:
        """Bring indexes and caches up to date; encoders that were used are released.

        Raises:
            UserError: A dataset has nothing to train on, or its settings cannot be met.
        """
        started, report, shard = time.monotonic(), DataReport(images=self._contents.images), self._shard()
        self._datasets = []
        self._indexed()
        builder = CacheBuilder(
            self._family, self._paths, shard=shard, workers=self._config.run.num_workers,
            progress=self._progress, synchronized=synchronized,
        )  # fmt: skip
        contents = self._contents
        caches = builder.build(self._datasets, report, images=contents.images, trajectories=contents.trajectories)
        for dataset in self._datasets:
            dataset.check_not_empty()
            dataset.count_captions()  # again: some may have been dropped
            dataset.index.release()
        self._loader = self._make_loader(caches)
        report.datasets = {dataset.id: dataset.counts for dataset in self._datasets}
        report.seconds = time.monotonic() - started
        if shard.rank == 0:
            self._write_quarantine(report)
        for line in report.lines():
            logger.info(line)
        return report

    def _indexed(self) -> list[Dataset]:
        """Return the datasets with their indexes up to date, for which no encoder is needed."""
        if not self._datasets:
            shard = self._shard()
            self._datasets = [self._open_dataset(settings, shard) for settings in self._config.datasets]
            for dataset in self._datasets:
                dataset.check_not_empty()
                dataset.count_captions()
                cut = cut_captions(dataset, self._family) if shard.rank == 0 else None
                dataset.counts.cut = cut.line() if cut else ""
        return self._datasets

    def _shard(self) -> WorkerShard:
        if in_group():
            return WorkerShard(self._layout.rank, self._layout.world_size)
        return WorkerShard()

    def _open_dataset(self, settings: DatasetSettings, shard: WorkerShard) -> Dataset:
        backend = self._registry.get("data_backend", settings.type)(settings.backend)
        path = self._paths.index(settings)
        rules = CaptionRules(settings)
        geometry = Geometry(settings, multiple=self._family.pixel_multiple)
        with synchronized():
            index = self._build_index(settings, backend, rules, geometry) if shard.rank == 0 else None
        dataset = Dataset(settings, backend, index or Index(path), geometry)
        quarantined = self._paths.quarantine_state(settings)
        if self._resumes and quarantined.exists():
            names: dict[str, str] = json.loads(quarantined.read_bytes())
            rows = dataset.index.rows_of(names).tolist()
            dataset.drop({row: names[dataset.index.key(row)] for row in rows})
        return dataset

    def _build_index(
        self, settings: DatasetSettings, backend: DataBackend, rules: CaptionRules, geometry: Geometry
    ) -> Index:
        path, workers = self._paths.index(settings), self._config.run.num_workers
        if not settings.has_images:
            source = open_source(backend, settings, workers=workers)
            return PromptIndexBuilder(settings.id, source, rules, edge=geometry.square()).build(path)
        builder = IndexBuilder(
            settings.id, backend, rules, workers=workers, progress=self._progress, again=not self._resumes
        )
        index = builder.build(path)
        if builder.num_unmatched:
            table = settings.metadata_file
            logger.info(f"dataset {settings.id!r}: {builder.num_unmatched:,} rows of {table} are of no image there")
        return index

    def _write_quarantine(self, report: DataReport) -> None:
        for dataset in self._datasets:
            path = self._paths.quarantine_list(dataset.settings)
            quarantined = self._paths.quarantine_state(dataset.settings)
            if dataset.dropped:
                write_whole(quarantined, json.dumps(dataset.dropped, indent=1).encode())
            else:
                quarantined.unlink(missing_ok=True)
            broken = report.datasets[dataset.id].quarantined
            if broken:
                write_whole(path, "".join(f"{line}\n" for line in named_with_reasons(broken)).encode())
            else:
                path.unlink(missing_ok=True)

    def _make_loader(self, caches: Caches) -> BatchLoader:
        cached, streams, spans = [], [], []
        for dataset in self._datasets:
            latents, texts = _locate(dataset, caches), caches.texts[dataset.id]
            if latents is not None:
                latents.cache.release_lookup()  # positions are all that is needed from here on
            captions = texts.locate(dataset.index.caption_digests)
            trajectories = caches.trajectories.get(dataset.id)
            cached.append(CachedDataset(dataset, latents, texts, captions, len(streams), trajectories))
            global_batch = self._layout.of(dataset).global_batch
            new = dataset.streams(self._heaviest(), None if global_batch == self.global_batch else global_batch)
            streams += new
            spans += [dataset.span] * len(new)
        order = Curriculum(streams, spans, global_batch=self._layout.global_batch, seed=self._seed)
        trajectories_alone = (each.cache for each in caches.trajectories.values())
        for cache in (*caches.texts.values(), *trajectories_alone):
            cache.release_lookup()
        return BatchLoader(cached, order, self._family, layout=self._layout, seed=self._seed)

    def _ready(self) -> BatchLoader:
        if self._loader is None:
            self.prepare()
        assert self._loader is not None
        return self._loader

    def cache_states(self) -> Iterator[CacheState]:
        """Compare each cache with the entries that the datasets need; indexes are brought up to date, nothing is
        encoded.
        """
        datasets = self._indexed()
        parents = dataset_folders(self._paths, [dataset.settings for dataset in datasets])
        beside = folders_beside(self._paths, parents)
        needed = needs(self._family, self._paths, datasets, images=self._contents.images)
        return cache_states(needed, [*parents, *beside])

    # -- training ---------------------------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """The number of images or prompts that are trained on, over all datasets."""
        return sum(dataset.counts.used for dataset in self._indexed())

    @property
    def global_batch(self) -> int:
        """The number of samples per optimizer step over all processes, for datasets without a ``train_batch_size``."""
        return self._layout.global_batch

    @property
    def samples_per_step(self) -> float:
        """The mean number of samples per optimizer step over all processes."""
        return self._ready().order.samples_per_step

    @property
    def resolution(self) -> tuple[int, int]:
        """The (width, height) in pixels of the first dataset's bucket with the most images."""
        buckets = self._indexed()[0].counts.buckets
        return max(buckets, key=lambda shape: (buckets[shape], shape))

    def steps_per_epoch(self) -> float:
        """Return the number of optimizer steps in which every sample comes once, times its repeats and weight."""
        return self._ready().order.steps_per_epoch

    def steps(self, start_step: int) -> Iterator[list[Batch]]:
        """Yield, without end, this process's micro-batches of each optimizer step from `start_step` on, on the CPU,
        read ahead.
        """
        depth = self._config.run.dataloader_prefetch
        prefetch = Prefetch(self._ready().at, first=start_step, depth=depth)
        self._open.append(prefetch)
        try:
            yield from prefetch
        finally:
            prefetch.close()
            self._open.remove(prefetch)

    def close(self) -> None:
        """Stop reading ahead."""
        for prefetch in list(self._open):
            prefetch.close()

    @property
    def samples_of_steps(self) -> list[int]:
        """The numbers of samples of an optimizer step over all processes: the run's, and datasets' own."""
        return [self.global_batch, *(each.global_batch or self.global_batch for each in self._ready().order.streams)]

    def fingerprint(self) -> str:
        """Hash the set of samples and its order, apart from the size of steps; a resumed run must find the hash that
        its checkpoint holds.
        """
        hasher = blake2b(f"2 {self._seed}".encode(), digest_size=16)
        streams = self._ready().order.streams
        hasher.update(json.dumps([_named(each) for each in streams]).encode())
        for dataset in self._datasets:
            settings = dataset.settings
            hasher.update(json.dumps(_choices(dataset)).encode())
            dataset.hash_into(hasher)
            if self._contents.trajectories:
                entry = self._paths.trajectory_entry(settings)
                made = [trajectory_descriptor(self._family, entry), entry.num_pairs_per_prompt, entry.noise_seed]
                hasher.update(json.dumps(made).encode())
        return hasher.hexdigest()

    # -- looking at the data ----------------------------------------------------------------------------------------

    def describe(self) -> list[str]:
        """Return lines on each dataset: what is used, in which buckets, what is left out and what is broken."""
        lines = []
        for dataset in self._indexed():
            batch = self._layout.of(dataset).global_batch
            lines += [*describe(dataset.id, dataset.counts), *small_buckets(dataset, batch, self._heaviest())]
        return lines

    def never_trained(self, num_steps: int) -> list[str]:
        """Return lines on the samples whose bucket never fills a batch in a run of `num_steps` steps, though it is long
        enough for a pass over the data.
        """
        order = self._ready().order
        if num_steps < int(order.steps_per_epoch):
            return []
        used, first, lines = order.used(num_steps), 0, []
        for dataset in self._datasets:
            own, first = used[first : first + len(dataset.shapes)], first + len(dataset.shapes)
            lines += unused_buckets(dataset, np.flatnonzero(~own), self._layout.of(dataset).global_batch, num_steps)
        return lines

    def _heaviest(self) -> float:
        return max(dataset.settings.probability for dataset in self._datasets) or 1.0

    def write_reports(self, folder: Path) -> list[DatasetReport]:
        """Write a report of each dataset below `folder`, in the first process; return those that are new or have
        changed.
        """
        datasets = [(dataset, self._layout.of(dataset).global_batch) for dataset in self._indexed()]
        return write_reports(datasets, folder) if self._layout.rank == 0 else []

    def real_images(self, count: int, width: int, height: int) -> Tensor:
        """Return up to `count` images of all datasets, fitted to width x height, shape (M, 3, H, W), float32 in [0, 1].

        Always the same ones for the same data; scaled to cover and cropped in the middle. None for prompts alone.
        """

        def read(opened: tuple[Dataset, int, Opener]) -> tuple[tuple[str, int], np.ndarray | None]:
            dataset, row, opener = opened
            try:
                return (dataset.id, row), dataset.image(row, lambda image: fit(image, width, height), opener)
            except (BrokenImage, OSError):
                return (dataset.id, row), None  # named by prepare(), or by the next run's

        chosen = self._choose(count, [dataset for dataset in self._indexed() if dataset.settings.has_images])
        workers = max(1, self._config.run.num_workers)
        with threads(workers) as pool:
            found = dict(ahead(pool, read, self._opened(chosen), depth=2 * workers))
        images = [each for dataset, row in chosen if (each := found.get((dataset.id, row))) is not None]
        if not images:
            return torch.zeros(0, 3, height, width)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255

    @staticmethod
    def _opened(chosen: Sequence[tuple[Dataset, int]]) -> Iterator[tuple[Dataset, int, Opener]]:
        """Yield each sample with the function that opens its image, those of a dataset together."""
        for dataset in {dataset.id: dataset for dataset, _ in chosen}.values():
            rows = np.array([row for each, row in chosen if each is dataset])
            yield from ((dataset, row, opener) for row, opener in dataset.opened(rows))

    def captions(self, count: int) -> list[str]:
        """Return up to `count` different captions of different samples, always the same for the same data."""
        found = (
            dataset.index.caption(int(dataset.index.caption_offsets[row]))
            for dataset, row in self._choose(64 * count, self._indexed())
        )
        return list(dict.fromkeys(found))[:count]

    @staticmethod
    def _choose(count: int, datasets: Sequence[Dataset]) -> list[tuple[Dataset, int]]:
        """Choose samples of `datasets`, in an order that depends on nothing but the number of samples."""
        starts = np.cumsum([0, *(dataset.counts.used for dataset in datasets)])
        total = int(starts[-1])
        positions = permute(np.arange(min(count, total)), total, derive_seed(0, "real_images"))
        numbers = np.searchsorted(starts, positions, side="right") - 1
        return [
            (datasets[number], int(datasets[number].rows[position - starts[number]]))
            for number, position in zip(numbers.tolist(), positions.tolist(), strict=True)
        ]


def _locate(dataset: Dataset, caches: Caches) -> CachedLatents | None:
    """Return a dataset's latents with the position of each image's, or None where there are none."""
    cache = caches.latents.get(dataset.id)
    if cache is None:
        return None
    positions = [cache.locate(dataset.entry_keys(dataset.rows, flip)) for flip in flips(dataset)]
    return CachedLatents(cache, np.stack(positions))


def _choices(dataset: Dataset) -> list[object]:
    """Return the settings that decide a dataset's batches beside its samples, crops and order."""
    settings = dataset.settings
    told = [] if settings.micro_conditioning == "actual" else [settings.micro_conditioning]
    return [settings.random_flip, settings.caption_dropout_probability, str(dataset.span), *told]


def _named(stream: Stream) -> list[object]:
    return [stream.name, stream.size, str(stream.rate)]
