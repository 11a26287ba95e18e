# pyright: reportAttributeAccessIssue=false
"""The figures of a dataset: sizes, shapes, buckets and captions, column by column from its index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..hashing import Int64s
from ..index.index import NO_CAPTION
from ..samples.file_checks import printable
from ..samples.geometry import ASPECTS, MEGAPIXEL

if TYPE_CHECKING:
    from ..dataset import Dataset

CHUNK = 1 << 20
"""Captions that are counted at a time, to bound memory."""
ASPECT_NAMES = ("1:2", "9:16", "2:3", "3:4", "4:5", "1:1", "5:4", "4:3", "3:2", "16:9", "2:1")
WORD_EDGES = np.array([1, 2, 3, 5, 8, 12, 20, 30, 50, 75, 100, 150, 200, 500, 1000])
"""First number of words of each bin but the lowest."""
NAMED = 1000
"""Samples without a caption that are named."""


@dataclass(frozen=True)
class Spread:
    """The lowest, the median and the highest of some numbers."""

    lowest: float
    median: float
    highest: float

    @classmethod
    def of(cls, values: NDArray[np.integer] | NDArray[np.floating]) -> Spread:
        """Measure a column that is not empty, shape (n,)."""
        return cls(float(values.min()), float(np.median(values)), float(values.max()))


@dataclass(frozen=True)
class Histogram:
    """Counts by bin; empty bins at both ends are left out."""

    labels: list[str]
    counts: list[int]

    @classmethod
    def of(cls, bins: Int64s, labels: Sequence[str]) -> Histogram:
        """Count bin numbers, shape (n,)."""
        counts = np.bincount(bins, minlength=len(labels))
        filled = np.flatnonzero(counts)
        inside = slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(0)
        return cls(list(labels[inside]), counts[inside].tolist())


@dataclass(frozen=True)
class Bucket:
    """The way in which one bucket fills batches.

    Attributes:
        width: In pixels.
        height: In pixels.
        samples: Different samples.
        per_epoch: Samples of one epoch, with repeats and weight.
        full_batches: Batches in the first epoch.
        carried_over: Samples of it that wait for the next epoch's.
    """

    width: int
    height: int
    samples: int
    per_epoch: float
    full_batches: int
    carried_over: float


@dataclass(frozen=True)
class DatasetStatistics:
    """The figures that a dataset's report shows.

    Attributes:
        id: The dataset's.
        noun: The word for a sample: ``image`` or ``prompt``.
        location: Its source, for messages.
        found: Samples there.
        used: Samples that are trained on.
        file_bytes: Size of the used files, 0 where it is not known.
        left_out: Samples left out on purpose, by reason.
        broken: Quarantined samples, name -> reason.
        without_caption: Names of the first samples without a caption.
        width: In pixels; None without images.
        height: In pixels.
        megapixels: Sizes of the images.
        sizes: Images by megapixels.
        aspects: Images by the nearest common width : height.
        enlarged: Share of images that are scaled up.
        global_batch: Samples per optimizer step.
        buckets: The largest first.
        captions: Captions of the used samples, with those that come again.
        different_captions: Different texts of the used samples.
        cut: What is said of captions that the text encoders do not read to their end.
        captions_each: Per sample.
        words: Per caption.
        word_counts: Captions by their number of words.
    """

    id: str
    noun: str
    location: str
    found: int
    used: int
    file_bytes: int
    global_batch: int
    buckets: list[Bucket]
    captions: int
    different_captions: int
    captions_each: Spread
    words: Spread
    word_counts: Histogram
    left_out: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    without_caption: list[str] = field(default_factory=list)
    width: Spread | None = None
    height: Spread | None = None
    megapixels: Spread | None = None
    sizes: Histogram | None = None
    aspects: Histogram | None = None
    enlarged: float = 0.0
    cut: str = ""

    @property
    def title(self) -> str:
        """The headline of the report."""
        return f"{self.id}: {self.used:,} of {self.found:,} {self.noun}s used"


def statistics_of(dataset: Dataset, *, global_batch: int, heaviest: float) -> DatasetStatistics:
    """Compute the figures of a dataset of which at least one sample is used.

    Args:
        dataset: With its index.
        global_batch: Samples per optimizer step over all processes.
        heaviest: The largest probability of all datasets.
    """
    counts, index, rows = dataset.counts, dataset.index, dataset.rows
    per_sample = np.diff(index.caption_offsets)[rows]
    words = _words(dataset)
    lacking = np.flatnonzero(index.having(NO_CAPTION))[:NAMED]
    return DatasetStatistics(
        id=dataset.id, noun=counts.noun, location=dataset.backend.location, found=counts.found, used=counts.used,
        file_bytes=pc.sum(index.table["size"].take(rows)).as_py() or 0, global_batch=global_batch,
        buckets=_buckets(dataset, global_batch, heaviest), captions=int(per_sample.sum()),
        different_captions=counts.captions, captions_each=Spread.of(per_sample), words=Spread.of(words),
        word_counts=Histogram.of(np.searchsorted(WORD_EDGES, words, side="right"), _word_labels()),
        cut=counts.cut, left_out=dict(counts.left_out), broken=dict(counts.quarantined),
        without_caption=[printable(index.key(row)) for row in lacking],
        **(_shapes(dataset) if dataset.settings.has_images else {}),
    )  # fmt: skip


def _shapes(dataset: Dataset) -> dict[str, Any]:
    """Compute sizes and shapes of the used images."""
    width, height = dataset.index.width[dataset.rows], dataset.index.height[dataset.rows]
    megapixels = width.astype(np.float32) * height / np.float32(MEGAPIXEL)
    exponents = np.clip(np.floor(np.log2(megapixels)), -11, 7).astype(np.int64) + 11
    middles = (np.log(ASPECTS[1:]) + np.log(ASPECTS[:-1])) / 2
    half_step = np.log(ASPECTS[-1] / ASPECTS[-2]) / 2
    edges = np.array([-middles[-1] - 2 * half_step, *middles, middles[-1] + 2 * half_step])
    bins = np.searchsorted(edges, np.log(width / height), side="right")
    bucket_w = np.repeat([width for width, _ in dataset.shapes], np.diff(dataset.starts))
    bucket_h = np.repeat([height for _, height in dataset.shapes], np.diff(dataset.starts))
    labels = [_power(exponent) for exponent in range(-11, 8)]
    return {
        "width": Spread.of(width), "height": Spread.of(height), "megapixels": Spread.of(megapixels),
        "sizes": Histogram.of(exponents, [f"under {labels[1]}", *(f"from {label}" for label in labels[1:])]),
        "aspects": Histogram.of(bins, ["taller", *ASPECT_NAMES, "wider"]),
        "enlarged": float(((bucket_w > width) | (bucket_h > height)).mean()),
    }  # fmt: skip


def _power(exponent: int) -> str:
    return str(2**exponent) if exponent >= 0 else f"1/{2**-exponent}"


def _word_labels() -> list[str]:
    ends = [*(WORD_EDGES[1:] - 1), 0]
    edges = zip(WORD_EDGES, ends, strict=True)
    return ["none", *(f"{a}+" if not b else str(a) if a == b else f"{a}-{b}" for a, b in edges)]


def _buckets(dataset: Dataset, global_batch: int, heaviest: float) -> list[Bucket]:
    found = []
    for (width, height), stream in zip(dataset.shapes, dataset.streams(heaviest or 1.0), strict=True):
        quota = Fraction(stream.size) * stream.rate
        full = int(quota // global_batch)
        found.append(Bucket(width, height, stream.size, float(quota), full, float(quota - full * global_batch)))
    return sorted(found, key=lambda bucket: (-bucket.samples, bucket.width, bucket.height))


def _words(dataset: Dataset) -> NDArray[np.int32]:
    """Count the words of each caption of the used samples; captions have one blank between words."""
    index = dataset.index
    wanted = np.zeros(len(index.caption_digests), np.bool_)
    wanted[dataset.caption_positions()] = True
    parts = [np.zeros(0, np.int32)]
    for start in range(0, len(wanted), CHUNK):
        mask = wanted[start : start + CHUNK]
        texts = index.caption_texts.slice(start, len(mask))
        blanks = pc.count_substring(texts, " ").to_numpy(zero_copy_only=False)
        parts.append((blanks[mask] + 1).astype(np.int32))
    return np.concatenate(parts)
