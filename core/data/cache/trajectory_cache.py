"""The distillation cache: the teacher's trajectories for captions, from noise that is a pure function of seed and
caption.

An entry is one trajectory of the teacher's sampler (kept points and end) for a caption, a size and a number that tells
noises apart. Its key holds these three and the seed; everything else that it depends on is in the cache's descriptor.
Work is cut into shards as in the other caches: a killed build goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...diffusion.guidance import guides
from ...diffusion.solvers import TimestepGrid, trailing_timesteps
from ...errors import UserError
from ...plugin_api.batch import Trajectories
from ...plugin_api.family import MicroConditioning
from ...utils.finite import finite_rows
from ...utils.progress import TaskProgress
from ...utils.prompt_library import shortened
from ...utils.seeds import derive_seed
from ..dataset import Dataset
from ..hashing import Int64s, UInt64s, combine
from .encode import as_void, chunked, per_call
from .teacher_trajectory import TeacherAlone, follow
from .tensor_cache import TensorCache

if TYPE_CHECKING:
    from ...plugin_api.batch import Conditioning
    from ...plugin_api.family import ModelFamily
    from ...settings.dataset_settings import DatasetSettings

FORMAT = 1
POINTS, DATA = "points", "data"


def trajectory_descriptor(family: ModelFamily, settings: DatasetSettings) -> dict[str, Any]:
    """Return everything that all trajectories of a cache depend on."""
    timesteps, kept = timesteps_of(family, settings)
    return {
        "kind": "trajectories", "format": FORMAT, "family": family.name, "denoiser": family.fingerprint("denoiser"),
        "text": family.fingerprint("text"), "solver": settings.solver, "steps": len(timesteps),
        "guidance": settings.guidance_scale, "points": kept, "dtype": "float32",
    }  # fmt: skip


def timesteps_of(family: ModelFamily, settings: DatasetSettings) -> tuple[TimestepGrid, list[int]]:
    """Return the timesteps of a distillation cache's sampler, and the numbers of the points that are kept."""
    steps, points = settings.num_inference_steps, settings.trajectory_points
    assert steps is not None, "filled in with the configuration"
    assert points is not None, "filled in with the configuration"
    return trailing_timesteps(family.schedule, steps), list(range(0, steps, steps // points))


def uncropped_image(width: int, height: int, count: int) -> MicroConditioning:
    """Return the micro-conditioning of `count` images that are neither scaled nor cropped, sizes in pixels."""
    return MicroConditioning([(height, width)] * count, [(0, 0)] * count, [(height, width)] * count)


def noise(key: NDArray[np.uint64], shape: Sequence[int]) -> Tensor:
    """Draw the noise that an entry's trajectory starts from, with a CPU generator seeded by the entry's key alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(noise_seed(key)))


def noise_seed(key: NDArray[np.uint64]) -> int:
    """Return the seed of that generator; a pipeline that is given it starts from the same noise."""
    return derive_seed(0, "pair", key.tobytes().hex())


@dataclass(frozen=True)
class CachedTrajectories:
    """The trajectories of a dataset's captions.

    Attributes:
        cache: The cache that holds them.
        positions: Position in the cache of each caption, for each noise; shape (K, m), m as in
            ``dataset.index.caption_digests``.
        times: Times of the points of a trajectory, falling, shape (P,).
    """

    cache: TensorCache
    positions: Int64s
    times: Tensor

    def read(self, numbers: Int64s, captions: Int64s, cond: Conditioning) -> Trajectories:
        """Read the trajectories `numbers` (B,) of captions (B,), which were made with `cond`."""
        found = self.cache.read(self.positions[numbers, captions])
        return Trajectories(points=found[POINTS].float(), times=self.times, data=found[DATA].float(), cond=cond)


@dataclass(frozen=True)
class TrajectoryJob:
    """One shard's worth of trajectories of one size."""

    bucket: int
    captions: Int64s
    keys: UInt64s


class WantedTrajectories:
    """The trajectories that a dataset's captions should have.

    Args:
        dataset: Gives the captions of the samples in use, each in the size of its bucket.
        settings: Settings of the distillation cache.
    """

    def __init__(self, dataset: Dataset, settings: DatasetSettings) -> None:
        self.dataset, self.settings = dataset, settings
        offsets = dataset.index.caption_offsets
        counts = np.diff(offsets)[dataset.rows]
        first = np.repeat(offsets[dataset.rows] - np.cumsum(counts) + counts, counts)
        self.captions: Int64s = first + np.arange(int(counts.sum()))
        """Positions of the captions in use; shape (n,)."""
        self.buckets: Int64s = np.repeat(np.repeat(np.arange(len(dataset.shapes)), np.diff(dataset.starts)), counts)

    @cached_property
    def keys(self) -> UInt64s:
        """The keys of all trajectories, shape (K, n, 2)."""
        digests, settings = self.dataset.index.caption_digests[self.captions], self.settings
        sizes = np.array(self.dataset.shapes, np.int64)[self.buckets]
        count = len(digests)
        common = [np.full(count, settings.noise_seed), sizes[:, 0], sizes[:, 1]]
        numbers = range(settings.num_pairs_per_prompt)
        return np.stack([combine(digests, [np.full(count, number), *common]) for number in numbers])

    def locate(self, cache: TensorCache) -> Int64s:
        """Return the locations of the trajectories in the cache, -1 where absent; shape (K, n)."""
        return cache.locate(self.keys.reshape(-1, 2)).reshape(self.keys.shape[:2])

    def cached(self, cache: TensorCache, family: ModelFamily) -> CachedTrajectories:
        """Return the trajectories for the loader; all must be in the cache."""
        positions = np.full((self.settings.num_pairs_per_prompt, len(self.dataset.index.caption_digests)), -1)
        positions[:, self.captions] = self.locate(cache)
        timesteps, kept = timesteps_of(family, self.settings)
        return CachedTrajectories(cache, positions, timesteps.times[kept])

    def missing(self, cache: TensorCache) -> list[TrajectoryJob]:
        """Return the shards to make: the first trajectory of every caption and size, then the second, ..."""
        absent = self.locate(cache) < 0
        _, once = np.unique(as_void(self.keys[0]), return_index=True)
        chosen = np.zeros(len(self.captions), np.bool_)
        chosen[once] = True
        jobs = []
        for number, keys in enumerate(self.keys):
            for bucket in range(len(self.dataset.shapes)):
                todo = np.flatnonzero(absent[number] & chosen & (self.buckets == bucket))
                jobs += [
                    TrajectoryJob(bucket, self.captions[part], keys[part])
                    for part in chunked(todo, self.settings.write_batch_size)
                ]
        return jobs

    @property
    def num_trajectories(self) -> int:
        """The number of distinct trajectories."""
        return len(np.unique(as_void(self.keys[0]))) * len(self.keys)


class TrajectoryMaker:
    """Makes trajectories with the teacher, which is loaded on first use and freed by :meth:`release`.

    Args:
        family: The teacher's family.
        progress: Reports every trajectory.
    """

    def __init__(self, family: ModelFamily, *, progress: TaskProgress) -> None:
        self.family, self._progress = family, progress
        self._teacher = TeacherAlone(family)

    def run(
        self, wanted: WantedTrajectories, jobs: Sequence[TrajectoryJob], cache: TensorCache, texts: TensorCache
    ) -> None:
        """Make the trajectories of `jobs` and add them to the cache.

        Args:
            wanted: The trajectories that the jobs belong to.
            jobs: Some of the missing trajectories.
            cache: Takes the trajectories.
            texts: Holds the captions' embeddings.
        """
        dataset, settings = wanted.dataset, wanted.settings
        total = sum(len(job.keys) for job in jobs)
        with self._progress(f"making trajectories of {settings.id!r}", total) as advance, torch.no_grad():
            for job in jobs:
                width, height = dataset.shapes[job.bucket]
                made = []
                for part in chunked(np.arange(len(job.keys)), per_call(settings.pair_batch_size, width, height)):
                    embeds = texts.read(texts.locate(dataset.index.caption_digests[job.captions[part]]))
                    made.append(self._make(settings, job.keys[part], embeds, width, height))
                    advance(len(part))
                tensors = {name: torch.cat([each[name] for each in made]) for name in (POINTS, DATA)}
                _check_finite(tensors, wanted, job)
                cache.write(job.keys, tensors)

    def _make(
        self, settings: DatasetSettings, keys: UInt64s, embeds: Conditioning, width: int, height: int
    ) -> dict[str, Tensor]:
        family, device = self.family, self.family.settings.device
        shape = (family.latent_channels, height // family.scale_factor, width // family.scale_factor)
        start = torch.stack([noise(key, shape) for key in keys]).to(device)
        cond = family.condition(embeds, uncropped_image(width, height, len(keys)))
        cond = {name: value.to(device) for name, value in cond.items()}
        timesteps, kept = timesteps_of(family, settings)
        predict = self._teacher.guided(cond, settings.guidance_scale or 0.0)
        trajectory = follow(predict, start, timesteps.to(device), solver=settings.solver, keep=kept)
        return {POINTS: trajectory.points.float().cpu(), DATA: trajectory.data.float().cpu()}

    def release(self) -> None:
        """Free the teacher."""
        self._teacher.release()


def cost(settings: DatasetSettings, missing: int, total: int) -> str:
    """Describe what making `missing` of `total` trajectories takes."""
    guidance, steps = settings.guidance_scale or 0.0, settings.num_inference_steps or 0
    calls = missing * steps * (2 if guides(guidance) else 1)
    return (
        f"trajectories of {settings.id!r}: {missing:,} of {total:,} are made: {steps} steps of the teacher at guidance "
        f"{guidance:g}, {calls:,} predictions; what is made is kept if this is stopped"
    )


def _check_finite(tensors: dict[str, Tensor], wanted: WantedTrajectories, job: TrajectoryJob) -> None:
    """Raise UserError that names the first caption whose trajectory is not finite."""
    bad = np.flatnonzero(~finite_rows(tensors).numpy())
    if not len(bad):
        return
    caption = shortened(wanted.dataset.index.caption(int(job.captions[bad[0]])))
    raise UserError(
        f"distillation cache {wanted.settings.id!r}: the teacher makes NaN or infinity of {len(bad)} of "
        f"{len(job.keys)} trajectories, the first that of the caption {caption}",
        "use mixed_precision=bf16 or no, or a lower guidance_scale of that entry; what was made before is kept",
    )
