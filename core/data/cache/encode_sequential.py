"""Filling the latent cache from a source that can only be read in its order: latents, not pixels, wait for their
shards.

Every process has a part of the source. A shard holds images of one bucket in the source's order, as many as any other;
its latents wait in memory until it is full: at most one unfinished shard for each bucket and mirroring. A killed build
starts again at the first image whose latents are missing, with the same batches, hence the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...utils.progress import TaskProgress
from ...utils.threads import threads
from ..hashing import Int64s
from ..index.sequential import Opener, positions_of
from ..samples.images import BrokenImage
from .encode import LARGEST_BATCH, Filling, Image, Job, LatentEncoder, WorkerShard, ahead


@dataclass(frozen=True)
class _Entries:
    """The images to be encoded, in the order of index rows; arrays of shape (n,).

    Attributes:
        rows: Index rows, growing.
        jobs: Numbers of the jobs.
        positions: Positions in those jobs.
    """

    rows: Int64s
    jobs: Int64s
    positions: Int64s

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> _Entries:
        sizes = [len(job.rows) for job in jobs]
        rows = np.concatenate([job.rows for job in jobs])
        numbers, positions = np.repeat(np.arange(len(jobs)), sizes), np.concatenate([np.arange(size) for size in sizes])
        order = np.argsort(rows, kind="stable")
        return cls(rows[order], numbers[order], positions[order])

    def of_row(self, row: int) -> list[tuple[int, int]]:
        """Return (number of the job, position in it) for each mirroring of an image."""
        part = slice(np.searchsorted(self.rows, row), np.searchsorted(self.rows, row, side="right"))
        return list(zip(self.jobs[part].tolist(), self.positions[part].tolist(), strict=True))


class SequentialEncoder(LatentEncoder):
    """An encoder that takes images in the order in which the source delivers them."""

    def plan(self) -> list[Job]:
        """Return the shards to make, in the order in which they become complete."""
        return sorted(super().plan(), key=lambda job: int(self._positions(job.rows[-1:])[0]))

    def own_jobs(self, jobs: Sequence[Job], shard: WorkerShard) -> list[Job]:
        """Return this process's part: consecutive shards, so that each process reads about as much as it encodes."""
        start, end = (len(jobs) * rank // shard.world for rank in (shard.rank, shard.rank + 1))
        return list(jobs[start:end])

    def _positions(self, rows: Int64s) -> Int64s:
        return positions_of(self.dataset.index, rows)

    def _in_order(self, rows: Int64s, positions: Int64s) -> Int64s:
        return positions[np.argsort(self._positions(rows[positions]))]

    def run(self, jobs: Sequence[Job], *, progress: TaskProgress) -> None:
        """Encode and write; broken images are noted in :attr:`broken` and the work goes on."""
        if not jobs:
            return
        entries, shards = _Entries.of(jobs), [self._filling(job) for job in jobs]
        with (
            progress(f"encoding images of {self.dataset.id!r}", len(entries.rows)) as advance,
            threads(self.workers) as pool,
            torch.inference_mode(),
        ):
            opened = self.dataset.opened(np.unique(entries.rows))
            for row, images in ahead(pool, self._read_both, opened, depth=max(2 * self.workers, LARGEST_BATCH)):
                for number, position in entries.of_row(row):
                    self._put(shards[number], position, images[jobs[number].flip], advance)
            self._end(shards, advance)

    def _end(self, shards: Sequence[Filling], advance: Callable[[int], None]) -> None:
        """Complete the shards whose images the source has not all delivered."""
        for shard in shards:
            for position in range(len(shard.job.rows)):
                if position not in shard.seen:
                    self._put(shard, position, FileNotFoundError("the source did not bring it this time"), advance)

    def _read_both(self, opened: tuple[int, Opener]) -> tuple[int, tuple[Image, Image]]:
        """Return an index row with its image as it is and mirrored."""
        row, opener = opened
        try:
            pixels = self.dataset.pixels(row, flip=False, opener=opener)
        except (BrokenImage, OSError) as error:
            return row, (error, error)
        return row, (pixels, pixels[:, ::-1])
