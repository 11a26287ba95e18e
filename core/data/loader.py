"""From an optimizer step to this process's micro-batches, read from the memory-mapped caches."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from ..plugin_api.batch import Batch, Conditioning, Trajectories
from ..plugin_api.family import MicroConditioning
from ..utils.seeds import RngStreams
from .cache.encode import LATENTS
from .cache.tensor_cache import TensorCache
from .cache.trajectory_cache import CachedTrajectories, uncropped_image
from .dataset import Dataset
from .hashing import Int64s
from .order import Curriculum

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily

T = TypeVar("T")
LAST_BATCH_SECONDS = 60.0
"""Time in which the batch in the making is finished; files on a network that hang are not to keep the process."""


@dataclass(frozen=True)
class CachedLatents:
    """The latents of a dataset.

    Attributes:
        cache: The cache that holds them.
        positions: Position of each image's latents, plain and mirrored; shape (flips, n), n as in ``dataset.rows``.
    """

    cache: TensorCache
    positions: Int64s


@dataclass(frozen=True)
class CachedDataset:
    """A dataset with the positions of its latents and captions in the caches.

    Attributes:
        latents: Its latents, or None for a method that needs no images.
        texts: The embeddings of its captions.
        captions: Position of each caption's embeddings, in the order of ``dataset.index.caption_digests``.
        first_stream: Number of its first bucket among the streams of all datasets.
        trajectories: Trajectories of the teacher for its captions, or None for a method that needs none.
    """

    dataset: Dataset
    latents: CachedLatents | None
    texts: TensorCache
    captions: Int64s
    first_stream: int
    trajectories: CachedTrajectories | None = None


SAMPLES_BETWEEN_RELEASES = 512
"""Each sample loads pages of a dozen columns of the index and what lies around them, nearly a megabyte."""


@dataclass(frozen=True)
class BatchLayout:
    """The cut of a global batch: micro-batch m of rank r has positions (m * world + r) * B ... + B."""

    micro_batch_size: int
    accumulation: int
    rank: int = 0
    world_size: int = 1

    def of(self, dataset: Dataset) -> BatchLayout:
        """Return the layout for this dataset, which may have a micro-batch size of its own."""
        return replace(self, micro_batch_size=dataset.settings.train_batch_size or self.micro_batch_size)

    @property
    def global_batch(self) -> int:
        """The number of samples per optimizer step over all processes."""
        return self.micro_batch_size * self.accumulation * self.world_size

    def positions(self, micro: int) -> np.ndarray:
        """Return the positions of this rank's micro-batch in the global batch, shape (B,)."""
        start = (micro * self.world_size + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size)


@dataclass(frozen=True)
class BatchContents:
    """What batches carry beside captions.

    Attributes:
        images: Latents of images; without, captions are enough and the autoencoder is not loaded.
        trajectories: The teacher's, from the distillation cache that each dataset names.
    """

    images: bool = True
    trajectories: bool = False


IMAGES_ALONE = BatchContents()


class BatchLoader:
    """The maker of the batches of any optimizer step.

    Args:
        datasets: All datasets, in the order of the streams.
        order: The samples of each step.
        family: Turns embeddings and sizes into conditioning.
        layout: The cut of the global batch, for datasets without a micro-batch size of their own.
        seed: The run's seed.
    """

    def __init__(
        self,
        datasets: list[CachedDataset],
        order: Curriculum,
        family: ModelFamily,
        *,
        layout: BatchLayout,
        seed: int,
    ) -> None:
        self.datasets, self.order, self.family = datasets, order, family
        self.layout, self.seed = layout, seed
        self._firsts = np.array([each.first_stream for each in datasets])
        self._num_read = 0

    def at(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of optimizer step `step`."""
        chosen = self.order.at(step)
        source = self.datasets[int(np.searchsorted(self._firsts, chosen.stream, side="right")) - 1]
        start, layout = source.dataset.starts[chosen.stream - source.first_stream], self.layout.of(source.dataset)
        self._num_read += layout.micro_batch_size * layout.accumulation
        if self._num_read > SAMPLES_BETWEEN_RELEASES:
            self._num_read = 0
            for each in self.datasets:
                each.dataset.index.release()
        return [
            self._batch(source, start + chosen.indices[positions], step, positions)
            for positions in map(layout.positions, range(layout.accumulation))
        ]

    def _batch(self, source: CachedDataset, indices: Int64s, step: int, positions: np.ndarray) -> Batch:
        """Make one micro-batch; `indices` are positions in ``dataset.rows``."""
        dataset, index = source.dataset, source.dataset.index
        rng = RngStreams(self.seed, step, positions.tolist())
        rows = dataset.rows[indices]
        flip = self._flip(dataset, rng, len(rows))
        offsets = index.caption_offsets[rows]
        counts = index.caption_offsets[rows + 1] - offsets
        number = (rng.uniform("caption").numpy() * counts).astype(np.int64) if counts.max() > 1 else 0 * counts
        captions = offsets + number
        latents = self._latents(source, indices, flip)
        embeds = source.texts.read(source.captions[captions])
        keys = [self._key(dataset, row, each, count) for row, each, count in zip(rows, number, counts, strict=True)]
        return Batch(
            latents=latents,
            cond=self._condition(dataset, rows, flip, embeds, rng),
            keys=tuple(keys),
            positions=tuple(positions.tolist()),
            captions=tuple(index.caption(position) for position in captions),
            latent_shape=self._latent_shape(dataset, rows) if latents is None else tuple(latents.shape[1:]),
            trajectories=self._trajectories(source, rows, captions, embeds, rng),
        )

    def _trajectories(
        self, source: CachedDataset, rows: Int64s, captions: Int64s, embeds: Conditioning, rng: RngStreams
    ) -> Trajectories | None:
        """Read one trajectory for each caption; which of its noises is drawn at random."""
        if source.trajectories is None:
            return None
        plan = source.dataset.plan(rows[:1])
        micro = uncropped_image(int(plan.bucket_w[0]), int(plan.bucket_h[0]), len(rows))
        numbers = rng.integers("pair", len(source.trajectories.positions)).numpy()
        return source.trajectories.read(numbers, captions, self.family.condition(embeds, micro))

    @staticmethod
    def _latents(source: CachedDataset, indices: Int64s, flip: np.ndarray) -> torch.Tensor | None:
        if source.latents is None:
            return None
        return source.latents.cache.read(source.latents.positions[flip.astype(np.int64), indices])[LATENTS].float()

    def _latent_shape(self, dataset: Dataset, rows: Int64s) -> tuple[int, ...]:
        """Return the shape (C, h, w) that the latents of these samples, all of one bucket, would have."""
        plan, factor = dataset.plan(rows[:1]), self.family.scale_factor
        return (self.family.latent_channels, int(plan.bucket_h[0]) // factor, int(plan.bucket_w[0]) // factor)

    @staticmethod
    def _flip(dataset: Dataset, rng: RngStreams, count: int) -> np.ndarray:
        if not dataset.settings.random_flip:
            return np.zeros(count, np.bool_)
        return rng.uniform("flip").numpy() < 0.5

    @staticmethod
    def _key(dataset: Dataset, row: int, number: int, count: int) -> str:
        key = f"{dataset.id}/{dataset.index.key(row)}"
        return f"{key}#{number}" if count > 1 else key

    def _condition(
        self, dataset: Dataset, rows: Int64s, flip: np.ndarray, embeds: Conditioning, rng: RngStreams
    ) -> Conditioning:
        """Combine embeddings with each sample's sizes, and put the unconditional where the caption is dropped."""
        cond = self.family.condition(embeds, self._micro(dataset, rows, flip))
        probability = dataset.settings.caption_dropout_probability
        if not probability:
            return cond
        dropped = rng.uniform("caption_dropout") < probability
        if not dropped.any():
            return cond
        uncond = self.family.uncond(cond)
        return {name: _where(dropped, uncond[name], value) for name, value in cond.items()}

    @staticmethod
    def _micro(dataset: Dataset, rows: Int64s, flip: np.ndarray) -> MicroConditioning:
        """Return the sizes that the network is told, as the dataset's ``micro_conditioning`` says."""
        plan, index, told = dataset.plan(rows), dataset.index, dataset.settings.micro_conditioning
        own = list(zip(index.height[rows].tolist(), index.width[rows].tolist(), strict=True))
        crop = list(zip(plan.top.tolist(), dataset.crop_left(plan, flip).tolist(), strict=True))
        bucket = list(zip(plan.bucket_h.tolist(), plan.bucket_w.tolist(), strict=True))
        return MicroConditioning(
            original_size=own if told == "actual" else bucket,
            crop_top_left=[(0, 0)] * len(rows) if told == "plain" else crop,
            target_size=bucket,
        )


def _where(mask: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """Select rows of `yes` where `mask` (B,) holds, else of `no`."""
    return torch.where(mask.reshape(-1, *[1] * (no.ndim - 1)), yes.to(no.dtype), no)


class Prefetch(Iterator[T]):
    """An iterator that computes ``make(first), make(first + 1), ...`` ahead in a thread; errors reach the consumer."""

    def __init__(self, make: Callable[[int], T], *, first: int, depth: int) -> None:
        self._make, self._queue = make, queue.Queue[tuple[T | None, BaseException | None]](maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(first,), name="distill-data", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _work(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                result: tuple[T | None, BaseException | None] = (self._make(number), None)
            except BaseException as error:  # handed over, whatever it is: nobody sees it in this thread
                result = (None, error)
            self._put(result)
            if result[1] is not None:
                return
            number += 1

    def _put(self, result: tuple[T | None, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(result, timeout=0.1)
            except queue.Full:
                continue
            return

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        result, error = self._queue.get()
        if error is not None:
            self._stop.set()
            raise error
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread: one that is inside torch when the interpreter ends would abort the process."""
        atexit.unregister(self.close)
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(LAST_BATCH_SECONDS)
