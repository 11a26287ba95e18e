"""Buckets that hold too few samples for a batch: what is trained on rarely, or never."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from ..dataset import Dataset
from ..hashing import Int64s
from ..samples.file_checks import printable

NAMED = 5
"""Buckets, and samples, that a line names."""
REMEDY = (
    "lower train_batch_size or gradient_accumulation_steps, make fewer buckets (aspect_bucket_rounding, crop), or give "
    "the dataset more repeats"
)


def small_buckets(dataset: Dataset, batch: int, heaviest: float) -> list[str]:
    """Return a line on the buckets that do not fill a batch in one epoch, if there are any.

    Args:
        dataset: With its buckets.
        batch: Samples per optimizer step over all processes.
        heaviest: The largest probability of all datasets.
    """
    quotas = [Fraction(stream.size) * stream.rate for stream in dataset.streams(heaviest)]
    small = [number for number, quota in enumerate(quotas) if 0 < quota < batch]
    if not small:
        return []
    longest = max(ceil(batch / quotas[number]) for number in small)
    return [
        f"{_head(dataset, small, batch)} in one epoch: a run of one epoch never trains there, and it takes up to "
        f"{longest} epochs until a batch is full; {REMEDY}"
    ]


def unused_buckets(dataset: Dataset, numbers: Int64s, batch: int, num_steps: int) -> list[str]:
    """Return a line on the buckets `numbers` that a run of `num_steps` steps never trains on, if there are any."""
    unused = numbers.tolist()
    if not unused or not dataset.settings.probability:
        return []
    rows = [row for number in unused for row in dataset.rows[dataset.starts[number] : dataset.starts[number + 1]]]
    names = ", ".join(printable(dataset.index.key(int(row))) for row in rows[:NAMED])
    more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
    return [
        f"{_head(dataset, unused, batch)} in this run (up to step {num_steps:,}) and will never be trained on: "
        f"{names}{more}; {REMEDY}, or train longer"
    ]


def _head(dataset: Dataset, numbers: list[int], batch: int) -> str:
    sizes = {dataset.shapes[number]: int(dataset.starts[number + 1] - dataset.starts[number]) for number in numbers}
    shown = ", ".join(f"{width}x{height}: {count:,}" for (width, height), count in list(sizes.items())[:NAMED])
    more = f" and {len(sizes) - NAMED:,} more" if len(sizes) > NAMED else ""
    count, noun = sum(sizes.values()), dataset.counts.noun
    plural = "s" if count != 1 else ""
    which = f"{len(sizes)} bucket{'s' if len(sizes) != 1 else ''} ({shown}{more})"
    return f"dataset {dataset.id!r}: {count:,} {noun}{plural} in {which} cannot fill a batch of {batch}"
