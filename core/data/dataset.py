"""One dataset: its index, which images or prompts are used, and the buckets that they fall into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import UserError
from ..plugin_api.backend import DataBackend, SampleBackend
from .hashing import Int64s, UInt64s, combine, count_different, permute
from .index.index import FILTERED, NO_CAPTION, Index, describe_listing
from .index.sequential import Opener, positions_of, read_in_order
from .order import Span, Stream
from .samples.geometry import REASONS, Geometry, Plan, flipped_left
from .samples.images import BrokenImage, decoded, read_file, scale_and_crop

if TYPE_CHECKING:
    from ..settings.dataset_settings import DatasetSettings

T = TypeVar("T")
CHUNK = 1 << 18
"""Rows that geometry is computed for at a time, to bound memory."""


@dataclass
class Counts:
    """Counts of a dataset's images (or prompts, where it has no images) by what became of them.

    Attributes:
        noun: The word for a sample: ``image`` or ``prompt``.
        found: Files that look like images.
        used: Images that are trained on.
        left_out: Images left out on purpose, by reason.
        quarantined: Broken files, name and reason.
        buckets: Images by (width, height).
        captions: Different texts of the images in use.
        without_caption: The first image that has none.
        cut: What is said of captions that the text encoders do not read to their end; empty where they read all.
    """

    noun: str = "image"
    found: int = 0
    used: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    buckets: dict[tuple[int, int], int] = field(default_factory=dict)
    captions: int = 0
    without_caption: str = ""
    cut: str = ""


def in_parts(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield the array in pieces of at most :data:`CHUNK` rows."""
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))


class Dataset:
    """The images (or prompts) of one data-file entry that pass its filters, grouped by bucket.

    Attributes:
        rows: Index rows in use, those of one bucket together; shape (n,).
        starts: Bucket b has rows[starts[b] : starts[b + 1]].
        shapes: (width, height) of each bucket.
        dropped: Samples that could not be encoded although their index row is good, name -> reason.
    """

    def __init__(self, settings: DatasetSettings, backend: DataBackend, index: Index, geometry: Geometry) -> None:
        self.settings, self.backend, self.index, self.geometry = settings, backend, index, geometry
        self.counts = Counts("image" if settings.has_images else "prompt", found=len(index))
        self.dropped: dict[str, str] = {}
        self._record_problems()
        rows, shapes = self._filter()
        self._group(rows, shapes)

    @property
    def id(self) -> str:
        """The dataset's name."""
        return self.settings.id

    # -- which images ---------------------------------------------------------------------------------------------

    def _record_problems(self) -> None:
        without = np.flatnonzero(self.index.having(NO_CAPTION))
        if len(without):
            self.counts.left_out["no caption"] = len(without)
            self.counts.without_caption = self.index.key(without[0])
        filtered = self.index.having(FILTERED)
        if filtered.any():
            self.counts.left_out["not meeting the conditions"] = int(filtered.sum())
        broken = ~(self.index.having("") | self.index.having(NO_CAPTION) | filtered)
        for row in np.flatnonzero(broken).tolist():
            self.counts.quarantined[self.index.key(row)] = self.index.problem(row)

    def _filter(self) -> tuple[Int64s, NDArray[np.int32]]:
        """Return the rows that pass the filters, shape (n,), and their (width, height) buckets, shape (n, 2)."""
        usable = np.flatnonzero(self.index.having(""))
        rows, shapes = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int32)]
        for start in range(0, len(usable), CHUNK):
            part = usable[start : start + CHUNK]
            plan = self.plan(part)
            codes = self.geometry.filter(self.index.width[part], self.index.height[part], plan)
            for code in np.unique(codes[codes > 0]):
                reason = REASONS[code]
                self.counts.left_out[reason] = self.counts.left_out.get(reason, 0) + int((codes == code).sum())
            rows.append(part[codes == 0])
            shapes.append(np.stack([plan.bucket_w, plan.bucket_h], axis=1)[codes == 0].astype(np.int32))
        return self._limit(np.concatenate(rows), np.concatenate(shapes))

    def _limit(self, rows: Int64s, shapes: NDArray[np.int32]) -> tuple[Int64s, NDArray[np.int32]]:
        limit = self.settings.max_num_samples
        if limit is None or len(rows) <= limit:
            return rows, shapes
        self.counts.left_out["beyond max_num_samples"] = len(rows) - limit
        chosen = np.sort(permute(np.arange(limit), len(rows), 0))
        return rows[chosen], shapes[chosen]

    def _group(self, rows: Int64s, shapes: NDArray[np.int32]) -> None:
        codes = [part[:, 0].astype(np.int64) << 32 | part[:, 1] for part in in_parts(shapes)]
        unique = np.unique(np.concatenate([np.zeros(0, np.int64), *map(np.unique, codes)]))
        small = np.uint16 if len(unique) < 2**16 else np.int64  # which is sorted in a pass or two
        bucket = np.concatenate([np.zeros(0, small), *(np.searchsorted(unique, code).astype(small) for code in codes)])
        counts = np.bincount(bucket, minlength=len(unique))
        self.rows = rows[np.argsort(bucket, kind="stable")]
        self.starts = np.cumsum([0, *counts])
        self.shapes = [(int(value >> 32), int(value & 0xFFFFFFFF)) for value in unique]
        self.counts.used = len(rows)
        self.counts.buckets = dict(zip(self.shapes, (int(count) for count in counts), strict=True))

    def drop(self, broken: Mapping[int, str]) -> None:
        """Leave out rows whose images turned out to be broken, row -> reason."""
        named = {self.index.key(row): reason for row, reason in broken.items()}
        self.dropped |= named
        self.counts.quarantined |= named
        keep = ~np.isin(self.rows, np.fromiter(broken, np.int64, len(broken)))
        sizes = np.diff(self.starts)
        shapes = np.repeat(np.array(self.shapes, np.int32).reshape(-1, 2), sizes, axis=0)
        order = np.argsort(self.rows[keep], kind="stable")
        self._group(self.rows[keep][order], shapes[keep][order])

    def check_not_empty(self) -> None:
        """Raise UserError, with what was looked for and where, if no image is left."""
        if not self.counts.used:
            raise UserError(*_nothing_left(self))

    # -- captions ---------------------------------------------------------------------------------------------------

    def caption_positions(self) -> Int64s:
        """Return the positions of the captions of the samples in use, growing, shape (m,)."""
        used = np.zeros(len(self.index), np.bool_)
        used[self.rows] = True
        return np.flatnonzero(np.repeat(used, np.diff(self.index.caption_offsets)))

    def count_captions(self) -> None:
        """Count the different texts of the samples in use."""
        self.counts.captions = count_different(self.index.caption_digests[self.caption_positions(), 0])

    # -- one image ------------------------------------------------------------------------------------------------

    def plan(self, rows: Int64s) -> Plan:
        """Return the scaling and crop of the images at these index rows."""
        return self.geometry.plan(self.index.width[rows], self.index.height[rows], self.index.draw[rows])

    def entry_keys(self, rows: Int64s, flip: int) -> UInt64s:
        """Return the cache keys of latents, made of the file and everything that decides its pixels, shape (n, 2)."""
        keys = np.empty((len(rows), 2), np.uint64)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            columns = [*self.plan(part).columns(), np.full(len(part), flip)]
            keys[start : start + CHUNK] = combine(self.index.identity[part], columns)
        return keys

    @property
    def in_order(self) -> bool:
        """True if the images can only be read in the order in which the source holds them."""
        return isinstance(self.backend, SampleBackend) and self.backend.in_order

    def opened(self, rows: Int64s) -> Iterator[tuple[int, Opener]]:
        """Yield index rows, each with the function that opens its image. Sequential sources yield them in their own
        order and leave out images that they do not deliver.
        """
        if not (isinstance(self.backend, SampleBackend) and self.in_order):
            yield from ((row, partial(self._open, row)) for row in rows.tolist())
            return
        positions = positions_of(self.index, rows)
        order = np.argsort(positions)
        found = dict(zip(positions.tolist(), rows.tolist(), strict=True))
        for position, opener in read_in_order(self.backend, self.index.path, positions[order]):
            yield found[position], opener

    def _open(self, row: int) -> BinaryIO:
        return self.backend.open(self.index.position(row))

    def image(self, row: int, use: Callable[[Image.Image], T], opener: Opener | None = None) -> T:
        """Return the result of `use` on the decoded image. Raises BrokenImage; OSError when the file cannot be read.

        Args:
            row: Index row.
            use: Called with the image, which it must not keep.
            opener: Opens the image, as :meth:`opened` gives it; needed for sequential sources.
        """
        with self._open(row) if opener is None else opener() as stream:
            data = read_file(stream)
        expected = int(self.index.width[row]), int(self.index.height[row])
        with decoded(data) as image:
            if image.size != expected:
                raise BrokenImage(
                    f"it is {image.width}x{image.height}, but its header said {expected[0]}x{expected[1]}"
                )
            return use(image)

    def pixels(self, row: int, *, flip: bool, opener: Opener | None = None) -> NDArray[np.uint8]:
        """Return the training image, shape (H, W, 3). Arguments and errors are those of :meth:`image`."""
        plan = self.plan(np.array([row]))
        cut = partial(
            scale_and_crop,
            size=(int(plan.resized_w[0]), int(plan.resized_h[0])),
            left=int(plan.left[0]),
            top=int(plan.top[0]),
            bucket=(int(plan.bucket_w[0]), int(plan.bucket_h[0])),
            flip=flip,
        )
        return self.image(row, cut, opener)

    def crop_left(self, plan: Plan, flip: NDArray[np.bool_]) -> Int64s:
        """Return the left edge of the crop that the network is conditioned on, in pixels of the scaled image, mirrored
        or not.
        """
        return np.where(flip, flipped_left(plan), plan.left)

    # -- order ------------------------------------------------------------------------------------------------------

    def streams(self, heaviest: float, global_batch: int | None = None) -> list[Stream]:
        """Return one stream of samples for each bucket.

        Args:
            heaviest: The largest probability of all datasets.
            global_batch: Samples per optimizer step where the dataset has a number of its own.
        """
        weight = Fraction(str(self.settings.probability)) / Fraction(str(heaviest))
        rate = weight * (1 + self.settings.repeats)
        sizes = np.diff(self.starts)
        return [
            Stream(f"{self.id}/{width}x{height}", int(size), rate, global_batch)
            for (width, height), size in zip(self.shapes, sizes, strict=True)
        ]

    def hash_into(self, hasher: blake2b) -> None:
        """Add everything that the batches depend on to the hash: samples, captions and crops, a part at a time."""
        for rows in in_parts(self.rows):
            hasher.update(self.index.draw[rows].data)
        for digests in in_parts(self.index.caption_digests):
            hasher.update(np.ascontiguousarray(digests).data)
        plans = [[column.astype(np.int32) for column in self.plan(rows).columns()] for rows in in_parts(self.rows)]
        for column in zip(*plans, strict=True):
            for part in column:
                hasher.update(part.data)

    @property
    def span(self) -> Span:
        """The optimizer steps in which the dataset is used."""
        return Span(self.settings.start_step, self.settings.end_step)


def _nothing_left(dataset: Dataset) -> tuple[str, str]:
    """Return the error message and the remedy for a dataset without a usable image."""
    counts, settings, where = dataset.counts, dataset.settings, dataset.backend.location
    head = f"dataset {settings.id!r} has no {counts.noun} to train on: "
    if not settings.has_images:
        return _no_prompt_left(head, dataset)
    if isinstance(dataset.backend, SampleBackend) and counts.left_out.get("no caption", 0) == counts.found:
        seen = f"none of its {counts.found:,} samples has a caption" if counts.found else "it has no samples"
        return f"{head}{where}: {seen}", "name the column of captions, or set caption_strategy to filename"
    if not counts.found:
        total, sample = describe_listing(dataset.backend)
        seen = f"it holds {total} other files ({', '.join(sample)}, ...)" if total else "it is empty"
        return (
            f"{head}looked in {where} and below for .jpg, .png, .webp and other image files; {seen}",
            f"point {dataset.backend.place_keys[0]} at the folder with the images, or set disabled: true",
        )
    if counts.left_out.get("no caption") == counts.found:
        return (
            f"{head}{counts.found} images in {where}, none with a caption: caption_strategy = textfile looks for a "
            f".txt of the same name (such as {counts.without_caption.rsplit('.', 1)[0]}.txt)",
            "add the .txt files, or set caption_strategy to filename or instanceprompt",
        )
    return (
        f"{head}all {counts.found:,} images in {where} were left out: {_reasons(counts)}",
        f"loosen what leaves them out, as --set data.{settings.id}.KEY=VALUE (what the entry does not say is the "
        "run's), or set disabled: true",
    )


def _reasons(counts: Counts) -> str:
    reasons = [f"{number:,} {reason}" for reason, number in counts.left_out.items()]
    if counts.quarantined:
        name, reason = next(iter(counts.quarantined.items()))
        reasons.append(f"{len(counts.quarantined):,} broken (first: {name}: {reason})")
    return "; ".join(reasons)


def _no_prompt_left(head: str, dataset: Dataset) -> tuple[str, str]:
    """Return the same for prompts: all are empty, or their files are broken."""
    return (
        f"{head}all {dataset.counts.found:,} in {dataset.backend.location} were left out: {_reasons(dataset.counts)}",
        "write the prompts there, check caption_column and caption_filter_list, or set disabled: true",
    )
