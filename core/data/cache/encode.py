"""Filling the caches: captions through the text encoders, images through the autoencoder.

Work is cut into shards of ``write_batch_size`` entries in a fixed order, and a shard is written as soon as it is full:
a killed build goes on at the first shard that is missing, with the same batches, hence the same bits.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...utils.disk import DiskFull, free_bytes
from ...utils.finite import finite_rows
from ...utils.progress import TaskProgress
from ...utils.prompt_library import shortened
from ...utils.seeds import derive_seed
from ...utils.threads import threads
from ..dataset import Dataset
from ..hashing import Int64s, UInt64s
from ..samples.geometry import MEGAPIXEL
from ..samples.images import BrokenImage, why_unread
from .tensor_cache import Failure, TensorCache

if TYPE_CHECKING:
    from ...plugin_api.family import ModelFamily

T = TypeVar("T")
R = TypeVar("R")
TEXT_BATCH = 32
LARGEST_BATCH = 64
LATENTS = "latents"
NOT_FINITE_LATENTS = "the autoencoder makes NaN or infinity of it"
NOT_FINITE_EMBEDDINGS = "the text encoders make NaN or infinity of its caption"


@dataclass(frozen=True)
class WorkerShard:
    """The part of the work that this process does when several build one cache."""

    rank: int = 0
    world: int = 1

    def of(self, chunks: Sequence[T]) -> list[T]:
        """Return every `world`-th chunk, from number `rank` on."""
        return list(chunks[self.rank :: self.world])


def chunked(rows: NDArray[np.int64], size: int) -> list[Int64s]:
    """Split rows into consecutive pieces of at most `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterator[T], depth: int) -> Iterator[R]:
    """Map a function over items in threads, in order, with at most `depth` results waiting."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# -- captions ---------------------------------------------------------------------------------------------------------


def missing_captions(cache: TensorCache, datasets: Sequence[Dataset]) -> list[tuple[Dataset, Int64s]]:
    """For each dataset, return the positions of the captions in use that must be encoded; each text once over all
    datasets.
    """
    todo, seen = [], np.zeros((0, 2), np.uint64)
    for dataset in datasets:
        digests, used = dataset.index.caption_digests, dataset.caption_positions()
        missing = used[(cache.locate(digests[used]) < 0) & ~cache.failed(digests[used])]
        _, first = np.unique(as_void(digests[missing]), return_index=True)
        first = missing[np.sort(first)]  # in the order of the images, which survives a restart
        first = first[~np.isin(as_void(digests[first]), as_void(seen))]
        seen = np.concatenate([seen, digests[first]])
        todo.append((dataset, first.astype(np.int64)))
    return todo


def as_void(keys: UInt64s) -> NDArray[np.void]:
    """View 128-bit keys (n, 2) as single values (n,), which can be compared."""
    return np.ascontiguousarray(keys).view(np.dtype((np.void, 16))).reshape(-1)


def encode_captions(
    cache: TensorCache,
    todo: Sequence[tuple[Dataset, Int64s]],
    family: ModelFamily,
    *,
    shard_size: int,
    progress: TaskProgress,
    shard: WorkerShard,
) -> None:
    """Encode captions and add them to the cache."""
    chunks = [(dataset, chunk) for dataset, positions in todo for chunk in chunked(positions, shard_size)]
    own = shard.of(chunks)
    left = sum(len(chunk) for _, chunk in own)
    with progress("encoding captions", left) as advance, torch.inference_mode():
        for dataset, chunk in own:
            parts = []
            for positions in chunked(chunk, TEXT_BATCH):
                parts.append(family.encode_prompts([dataset.index.caption(position) for position in positions]))
                advance(len(positions))
            tensors = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
            require_room(cache, left * sum(value.nbytes for value in tensors.values()) // len(chunk))
            left -= len(chunk)
            good, keys = finite_rows(tensors).numpy(), dataset.index.caption_digests[chunk]
            failures = [_failed_caption(dataset, int(each), family) for each in chunk[~good]]
            cache.write(keys[good], {name: value[good] for name, value in tensors.items()}, failures)


def _failed_caption(dataset: Dataset, position: int, family: ModelFamily) -> Failure:
    """Return the record of a caption whose embeddings are not finite."""
    caption = shortened(dataset.index.caption(position))
    why = f"{NOT_FINITE_EMBEDDINGS} {caption}: {family.overflow_remedies['text']}"
    return Failure(dataset.index.caption_digests[position].tobytes().hex(), caption, why)


def without_embeddings(cache: TensorCache, dataset: Dataset) -> dict[int, str]:
    """Return the samples in use that have a caption whose embeddings are not finite: index row -> reason."""
    index = dataset.index
    failed = np.flatnonzero(cache.failed(index.caption_digests) & (cache.locate(index.caption_digests) < 0))
    rows = np.searchsorted(index.caption_offsets, failed, side="right") - 1
    found = {}
    for row, position in zip(rows.tolist(), failed.tolist(), strict=True):
        failure = cache.failure(index.caption_digests[position])
        found.setdefault(row, failure.reason if failure else NOT_FINITE_EMBEDDINGS)
    used = np.isin(np.fromiter(found, np.int64, len(found)), dataset.rows)
    return {row: why for (row, why), is_used in zip(found.items(), used.tolist(), strict=True) if is_used}


def require_room(cache: TensorCache, num_bytes: int) -> None:
    """Raise DiskFull where what is still to be written has no room: now rather than after hours."""
    if num_bytes > free_bytes(cache.parent):
        raise DiskFull(cache.parent, f"{cache.label}: there is no room for the rest", needed_bytes=num_bytes)


# -- images ---------------------------------------------------------------------------------------------------------


def flips(dataset: Dataset) -> tuple[int, ...]:
    """Return the variants of each image that are cached: as it is (0), and mirrored (1) where the dataset flips."""
    return (0, 1) if dataset.settings.random_flip else (0,)


def images_per_call(dataset: Dataset, bucket: int) -> int:
    """Return the images per call of the autoencoder: ``vae_batch_size``, and more of small ones."""
    return per_call(dataset.settings.vae_batch_size, *dataset.shapes[bucket])


def per_call(asked: int, width: int, height: int) -> int:
    """Return `asked` images, and for images below a megapixel as many more as have the same pixels in all."""
    return max(asked, min(LARGEST_BATCH, int(asked * MEGAPIXEL / (width * height))))


@dataclass(frozen=True)
class Job:
    """One shard's worth of images of one bucket and one mirroring."""

    bucket: int
    flip: int
    rows: Int64s
    keys: UInt64s


Image: TypeAlias = NDArray[np.uint8] | BrokenImage | OSError
"""The pixels of a training image, shape (H, W, 3), or why there are none."""


@dataclass
class Filling:
    """A shard that is being filled, image by image in the order of its job.

    Attributes:
        job: The images that go into it.
        batches: Positions in the job of each call of the autoencoder.
        waiting: Images of the next call, by position in the job.
        seen: Positions in the job whose images have come.
        latents: Results of the calls so far, each of shape (b, C, h, w).
        good: Positions in the job of those latents.
        failures: Images that will never be read.
    """

    job: Job
    batches: deque[Int64s]
    waiting: dict[int, Image] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    latents: list[torch.Tensor] = field(default_factory=list)
    good: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class LatentEncoder:
    """The encoder of those images of one dataset that its cache lacks."""

    def __init__(self, dataset: Dataset, cache: TensorCache, family: ModelFamily, *, workers: int) -> None:
        self.dataset, self.cache, self.family = dataset, cache, family
        self.workers = max(1, min(workers, os.cpu_count() or 1), dataset.backend.parallel_reads)
        self.broken: dict[int, str] = {}
        """Rows whose images cannot be read, with the reason."""

    def plan(self) -> list[Job]:
        """Return the shards to make; fill :attr:`broken` with the failures of earlier builds."""
        dataset, jobs = self.dataset, []
        for flip in flips(dataset):
            for bucket in range(len(dataset.shapes)):
                rows = dataset.rows[dataset.starts[bucket] : dataset.starts[bucket + 1]]
                keys = dataset.entry_keys(rows, flip)
                missing = self.cache.locate(keys) < 0
                failed = missing & self.cache.failed(keys)
                for position in np.flatnonzero(failed):
                    failure = self.cache.failure(keys[position])
                    self.broken[int(rows[position])] = failure.reason if failure else ""
                positions = self._in_order(rows, np.flatnonzero(missing & ~failed))
                for chunk in chunked(positions, dataset.settings.write_batch_size):
                    jobs.append(Job(bucket, flip, rows[chunk], keys[chunk]))
        return jobs

    def _in_order(self, rows: Int64s, positions: Int64s) -> Int64s:
        """Sort `positions` among index `rows` into the order of encoding."""
        return positions

    def own_jobs(self, jobs: Sequence[Job], shard: WorkerShard) -> list[Job]:
        """Return the jobs of this process."""
        return shard.of(jobs)

    def run(self, jobs: Sequence[Job], *, progress: TaskProgress) -> None:
        """Encode and write; broken images are noted in :attr:`broken` and the work goes on."""
        total = sum(len(job.rows) for job in jobs)
        with (
            progress(f"encoding images of {self.dataset.id!r}", total) as advance,
            threads(self.workers) as pool,
            torch.inference_mode(),
        ):
            work = ((job, int(row)) for job in jobs for row in job.rows)
            images = ahead(pool, self._read, work, depth=max(2 * self.workers, LARGEST_BATCH))
            for job in jobs:
                shard = self._filling(job)
                for position in range(len(job.rows)):
                    self._put(shard, position, next(images), advance)

    def _read(self, work: tuple[Job, int]) -> Image:
        job, row = work
        try:
            return self.dataset.pixels(row, flip=bool(job.flip))
        except (BrokenImage, OSError) as error:
            return error

    def _filling(self, job: Job) -> Filling:
        return Filling(job, deque(chunked(np.arange(len(job.rows)), images_per_call(self.dataset, job.bucket))))

    def _put(self, shard: Filling, position: int, image: Image, advance: Callable[[int], None]) -> None:
        """Add the next image to a shard; encode when a batch is complete, write when the shard is."""
        shard.waiting[position] = image
        shard.seen.add(position)
        if len(shard.waiting) < len(shard.batches[0]):
            return
        usable = {position: image for position, image in shard.waiting.items() if isinstance(image, np.ndarray)}
        for position in shard.waiting.keys() - usable.keys():
            shard.failures += self._note(shard.job, position, shard.waiting[position])
        if usable:
            self._encode(shard, usable)
        advance(len(shard.waiting))
        shard.waiting = {}
        shard.batches.popleft()
        if not shard.batches:
            tensors = {LATENTS: torch.cat(shard.latents)} if shard.latents else {}
            self.cache.write(shard.job.keys[shard.good], tensors, shard.failures)

    def _encode(self, shard: Filling, images: dict[int, NDArray[np.uint8]]) -> None:
        """Add the latents of images, by position in the job; those that are not finite are failures."""
        latents = self._latents(shard.job, images)
        good = finite_rows({LATENTS: latents})
        for position, is_good in zip(images, good.tolist(), strict=True):
            if is_good:
                shard.good.append(position)
            else:
                why = f"{NOT_FINITE_LATENTS}: {self.family.overflow_remedies['vae']}"
                shard.failures += self._note(shard.job, position, BrokenImage(why))
        if good.any():
            shard.latents.append(latents[good])

    def _note(self, job: Job, position: int, error: object) -> list[Failure]:
        """Record a broken image; permanently only if the file itself is at fault, not if it was out of reach."""
        row = int(job.rows[position])
        self.broken[row] = why_unread(error, self.dataset.index.key(row))
        if not isinstance(error, BrokenImage):
            return []
        return [Failure(job.keys[position].tobytes().hex(), self.dataset.index.key(row), str(error))]

    def _latents(self, job: Job, images: dict[int, NDArray[np.uint8]]) -> torch.Tensor:
        """Sample the posterior of each image, with a generator that depends on the image's key alone."""
        stacked = torch.from_numpy(np.stack(list(images.values()))).permute(0, 3, 1, 2)
        draws = [int(self.dataset.index.draw[job.rows[position]]) for position in images]
        generators = [torch.Generator().manual_seed(derive_seed(draw, "posterior", job.flip)) for draw in draws]
        return self.family.encode_images(stacked.float() / 127.5 - 1, generators).detach().cpu()
