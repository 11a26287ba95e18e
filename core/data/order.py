"""The order of training samples as a pure function of (seed, step): nothing to save, random access to any step.

Every stream (one bucket of one dataset) is an endless sequence of permutations of its samples, cut into global batches.
In epoch e a stream gives floor((e + 1) q / G) - floor(e q / G) batches, with q its samples per epoch and G its global
batch: what does not fill a batch is carried over, so nothing is dropped and every sample comes exactly as often as
asked. All batches of an epoch are shuffled.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..utils.seeds import derive_seed
from .hashing import Int64s, permute

AHEAD = 1 << 14
"""Samples that are computed at once for consecutive steps, in a fraction of the time of each alone."""


@dataclass(frozen=True)
class Stream:
    """Samples that may share a batch.

    Attributes:
        name: Identifies the stream in random draws; independent of where the data lives.
        size: Number of samples.
        rate: Passes over the samples per epoch, exact.
        global_batch: Samples per optimizer step; None for that of the order.
    """

    name: str
    size: int
    rate: Fraction = Fraction(1)
    global_batch: int | None = None


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step: indices (G,) into one stream."""

    stream: int
    indices: Int64s
    epoch: int


@dataclass(frozen=True)
class Epoch:
    """The steps [start, end) of one epoch.

    Attributes:
        number: Counted from 0.
        first: Batches that each stream has given before; shape (streams,).
        ends: Running sum of the batches that each stream gives in it; shape (streams,).
    """

    number: int
    first: Int64s
    ends: Int64s
    start: int
    end: int


class SampleOrder:
    """The endless sequence of global batches over `streams`."""

    def __init__(self, streams: Sequence[Stream], *, global_batch: int, seed: int) -> None:
        self.streams, self.seed = tuple(streams), seed
        self._batches = [stream.global_batch or global_batch for stream in streams]
        quotas = [stream.size * stream.rate for stream in streams]
        self._numerators = [quota.numerator for quota in quotas]
        self._denominators = [quota.denominator * batch for quota, batch in zip(quotas, self._batches, strict=True)]
        self.samples_per_epoch = float(sum(quotas))
        self.steps_per_epoch = float(sum(map(Fraction, self._numerators, self._denominators)))
        if self.steps_per_epoch <= 0:
            raise ValueError("an order needs at least one sample")
        self._epoch = Epoch(-1, np.zeros(0, np.int64), np.zeros(0, np.int64), 0, 0)
        self._made: tuple[int, list[GlobalBatch]] = (0, [])  # first step, and batches from there on

    def _before(self, epoch: int) -> Int64s:
        """Return how many batches each stream has given before `epoch`, shape (streams,)."""
        fractions = zip(self._numerators, self._denominators, strict=True)
        return np.array([epoch * numerator // denominator for numerator, denominator in fractions], dtype=np.int64)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that optimizer step `step` falls into."""
        high = 1
        while self._before(high).sum() <= step:
            high *= 2
        return bisect_right(range(high), step, key=lambda epoch: self._before(epoch).sum()) - 1

    def _at_epoch_of(self, step: int) -> Epoch:
        if not self._epoch.start <= step < self._epoch.end:
            number = self.epoch_of(step)
            first, after = self._before(number), self._before(number + 1)
            self._epoch = Epoch(number, first, np.cumsum(after - first), int(first.sum()), int(after.sum()))
        return self._epoch

    def used(self, num_steps: int) -> NDArray[np.bool_]:
        """Return which streams give a batch in the first `num_steps` steps, shape (streams,)."""
        if num_steps < 1:
            return np.zeros(len(self.streams), np.bool_)
        epoch = self._at_epoch_of(num_steps - 1)
        found = epoch.first > 0
        found[self._streams_of(np.arange(num_steps - epoch.start), epoch)[1]] = True
        return found

    def _streams_of(self, steps: Int64s, epoch: Epoch) -> tuple[Int64s, Int64s]:
        """Return positions among the epoch's batches, and numbers of the streams, of steps counted from its start."""
        positions = permute(steps, epoch.end - epoch.start, derive_seed(self.seed, "batch_order", epoch.number))
        return positions, np.searchsorted(epoch.ends, positions, side="right")

    def at(self, step: int) -> GlobalBatch:
        """Return the samples of optimizer step `step`; consecutive steps are computed together, ever more at once."""
        first, made = self._made
        if not first <= step < first + len(made):
            follows = bool(made) and step == first + len(made)
            count = min(2 * len(made), max(1, AHEAD // max(self._batches))) if follows else 1
            first, made = self._made = (step, self._make(step, count))
        return made[step - first]

    def _make(self, step: int, count: int) -> list[GlobalBatch]:
        """Compute the batches of up to `count` steps from `step` on, within its epoch."""
        epoch = self._at_epoch_of(step)
        steps = np.arange(step, min(step + count, epoch.end)) - epoch.start
        positions, numbers = self._streams_of(steps, epoch)
        begins = epoch.ends - np.diff(epoch.ends, prepend=0)
        ordinals = epoch.first[numbers] + positions - begins[numbers]
        samples: list[Int64s] = [positions] * len(positions)
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            for at, indices in zip(chosen.tolist(), self._samples(number, ordinals[chosen]), strict=True):
                samples[at] = indices
        return [GlobalBatch(*each, epoch.number) for each in zip(numbers.tolist(), samples, strict=True)]

    def _samples(self, number: int, ordinals: Int64s) -> Int64s:
        """Return batches of a stream, shape (n, G): each position of its endless sequence is looked up in its own
        permutation.
        """
        stream, batch = self.streams[number], self._batches[number]
        positions = ordinals[:, None] * batch + np.arange(batch)
        passes, offsets = positions // stream.size, positions % stream.size
        chosen = np.empty_like(positions)
        for each in np.unique(passes).tolist():
            here = passes == each
            key = derive_seed(self.seed, "sample_order", stream.name, each)
            chosen[here] = permute(offsets[here], stream.size, key)
        return chosen


@dataclass(frozen=True)
class Span:
    """The optimizer steps [start, end) in which a dataset is used; no end means for ever."""

    start: int = 0
    end: int | None = None

    def covers(self, step: int) -> bool:
        """Return whether `step` lies inside."""
        return self.start <= step and (self.end is None or step < self.end)


class Curriculum:
    """A sequence of orders that changes where datasets join (``start_step``) or leave (``end_step``)."""

    def __init__(self, streams: Sequence[Stream], spans: Sequence[Span], *, global_batch: int, seed: int) -> None:
        self.streams = tuple(streams)
        borders = {0} | {span.start for span in spans} | {span.end for span in spans if span.end is not None}
        self._starts = np.array(sorted(borders), dtype=np.int64)
        self._members: list[list[int]] = []
        self._orders: list[SampleOrder | None] = []
        for number, start in enumerate(self._starts):
            members = [index for index, span in enumerate(spans) if span.covers(int(start)) and streams[index].rate > 0]
            own_seed = derive_seed(seed, "curriculum", number) if number else seed
            active = [streams[index] for index in members]
            self._members.append(members)
            self._orders.append(SampleOrder(active, global_batch=global_batch, seed=own_seed) if active else None)

    @property
    def steps_per_epoch(self) -> float:
        """The number of optimizer steps per epoch while the first datasets are in use."""
        return next((order.steps_per_epoch for order in self._orders if order is not None), 0.0)

    @property
    def samples_per_step(self) -> float:
        """The mean number of samples per optimizer step while the first datasets are in use."""
        first = next((order for order in self._orders if order is not None), None)
        return first.samples_per_epoch / first.steps_per_epoch if first else 0.0

    def at(self, step: int) -> GlobalBatch:
        """Return the samples of optimizer step `step`. Raises UserError where no dataset is in use."""
        phase = int(np.searchsorted(self._starts, step, side="right")) - 1
        order = self._orders[phase]
        if order is None:
            raise UserError(
                f"no dataset is in use at step {step}: every start_step is later or every end_step earlier",
                "give one dataset start_step 0 and no end_step, or shorten max_train_steps",
            )
        batch = order.at(step - int(self._starts[phase]))
        return GlobalBatch(self._members[phase][batch.stream], batch.indices, batch.epoch)

    def used(self, num_steps: int) -> NDArray[np.bool_]:
        """Return which streams give a batch in the first `num_steps` steps, shape (streams,)."""
        found, ends = np.zeros(len(self.streams), np.bool_), [*self._starts[1:].tolist(), num_steps]
        for start, end, members, order in zip(self._starts.tolist(), ends, self._members, self._orders, strict=True):
            if order is not None:
                found[members] |= order.used(min(end, num_steps) - start)
        return found
