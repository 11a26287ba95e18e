# pyright: reportAttributeAccessIssue=false
"""The index of a dataset: one Arrow table on disk, memory-mapped, with a row for each picture (or prompt) found.

Nothing here grows a Python object per picture: the listing, the rows and their captions are Arrow columns, and what the
pipeline keeps in memory are numpy views of the mapped file. Rows of files that have not changed are taken over from the
index that was there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..backend import DataBackend, Entry
from ..files import sync_folder
from .captions import CaptionRules, caption_key, read_text
from .hashing import UInt64s
from .images import SUFFIXES, BrokenImage, probe
from .progress import Progress
from .storage import partial_of

T = TypeVar("T")
FORMAT = 1
CHUNK = 8192

DIGEST = pa.binary(16)
LISTING = pa.schema([("key", pa.large_string()), ("size", pa.int64()), ("version", pa.large_string())])
SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("size", pa.int64()),
        ("version", pa.large_string()),
        ("caption_version", pa.large_string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("draw", pa.uint64()),
        ("identity", DIGEST),
        ("captions", pa.large_list(pa.large_string())),
        ("digests", pa.large_list(DIGEST)),
        ("problem", pa.large_string()),
    ]
)
NO_CAPTION = "it has no caption"


def digest(text: str) -> bytes:
    """128-bit hash of a text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def as_keys(array: pa.Array) -> UInt64s:
    """A column of 16-byte hashes as unsigned integers of shape (n, 2), without a copy."""
    raw = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint64)
    return raw[2 * array.offset : 2 * (array.offset + len(array))].reshape(-1, 2)


def in_chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    while chunk := list(islice(items, size)):
        yield chunk


@dataclass(frozen=True)
class Read:
    """What was found in one file."""

    width: int = 0
    height: int = 0
    captions: list[str] = field(default_factory=list)
    problem: str = ""


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array: the mapped one where there is one, for joining copies even that."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class Index:
    """A memory-mapped index.

    Attributes:
        width: Upright width in pixels, 0 for files with a problem; shape (n,).
        height: Upright height in pixels; shape (n,).
        draw: Hash of dataset id and key: the source of what is random about a picture for good; shape (n,).
        identity: Hash of dataset id, key, size and version of the file; shape (n, 2).
        caption_offsets: Captions of row i are [caption_offsets[i], caption_offsets[i + 1]); shape (n + 1,).
        caption_digests: Hashes of all captions; shape (m, 2).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as source:
            self.table = pa.ipc.open_file(source).read_all()
        columns = {name: _one_chunk(self.table.column(name)) for name in SCHEMA.names}
        self._keys, self._captions = columns["key"], columns["captions"]
        self._problems = columns["problem"]
        self.width: NDArray[np.int32] = columns["width"].to_numpy()
        self.height: NDArray[np.int32] = columns["height"].to_numpy()
        self.draw: UInt64s = columns["draw"].to_numpy()
        self.identity = as_keys(columns["identity"])
        self.caption_offsets: NDArray[np.int64] = self._captions.offsets.to_numpy()
        self._caption_texts = self._captions.values
        self.caption_digests = as_keys(columns["digests"].values)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int | np.integer) -> str:
        """The picture's key in its backend."""
        return self._keys[int(row)].as_py()

    def problem(self, row: int) -> str:
        """Why the row cannot be used; empty when it can."""
        return self._problems[int(row)].as_py()

    def caption(self, place: int) -> str:
        """A caption by its place among all captions."""
        return self._caption_texts[int(place)].as_py()

    def having(self, problem: str) -> NDArray[np.bool_]:
        """Which rows have this problem (empty: none at all), shape (n,)."""
        return pc.equal(self._problems, problem).to_numpy(zero_copy_only=False)

    def matches(self, rules: str) -> bool:
        """Whether the captions were made by the same rules."""
        meta = self.table.schema.metadata or {}
        return meta.get(b"rules") == rules.encode() and meta.get(b"format") == str(FORMAT).encode()


def has_name(entry: Entry) -> bool:
    """Whether the key is text: a file name that is no UTF-8 cannot be written to a table, nor named in a message."""
    return entry.key.isprintable() or not any("\ud800" <= letter <= "\udfff" for letter in entry.key)


def _list(backend: DataBackend) -> tuple[pa.Table, pa.Table, int]:
    """Pictures and caption files of a backend, as columns key, size, version; and how many names are no text."""
    pictures, texts, nameless = [], [], 0
    suffixes = "|".join(SUFFIXES)
    for chunk in in_chunks(backend.list(), CHUNK):
        named = [entry for entry in chunk if has_name(entry)]
        nameless += len(chunk) - len(named)
        batch = pa.RecordBatch.from_arrays(
            [
                pa.array([entry.key for entry in named], pa.large_string()),
                pa.array([entry.size for entry in named], pa.int64()),
                pa.array([entry.version for entry in named], pa.large_string()),
            ],
            schema=LISTING,
        )
        is_picture = pc.match_substring_regex(batch["key"], rf"(?i)\.({suffixes})$")
        pictures.append(batch.filter(is_picture))
        texts.append(batch.filter(pc.ends_with(batch["key"], ".txt")))
    return pa.Table.from_batches(pictures, LISTING), pa.Table.from_batches(texts, LISTING), nameless


def _with_caption_versions(pictures: pa.Table, texts: pa.Table, rules: CaptionRules) -> pa.Table:
    """Adds the version of each picture's caption file, empty where there is none."""
    if rules.reads_files:
        keys = pc.replace_substring_regex(pictures["key"], r"\.[^./]*$", ".txt")
        found = pc.index_in(keys, value_set=texts["key"].combine_chunks())
        versions = pc.fill_null(texts["version"].take(found), "")
    else:
        versions = pa.array(np.full(len(pictures), ""), pa.large_string())
    return pictures.append_column("caption_version", versions)


class IndexBuilder:
    """Brings a dataset's index up to date.

    Args:
        dataset: Id of the dataset.
        backend: Where it lives.
        rules: How captions are made.
        workers: Threads that read files.
        progress: Told of every file read.
    """

    def __init__(
        self, dataset: str, backend: DataBackend, rules: CaptionRules, *, workers: int, progress: Progress
    ) -> None:
        self.dataset, self.backend, self.rules = dataset, backend, rules
        self.workers, self.progress = max(1, workers), progress
        self.num_read = self.num_nameless = 0

    def build(self, path: Path) -> Index:
        """Write the index to `path`, reading only files that are new or have changed."""
        pictures, texts, self.num_nameless = _list(self.backend)
        listing = _with_caption_versions(pictures, texts, self.rules)
        reused, fresh = self._split(path, listing)
        if reused is not None and not len(fresh) and len(reused) == len(Index(path)):
            return Index(path)
        tables = [pa.Table.from_batches(self._read(fresh), SCHEMA)]
        self.num_read = len(fresh)
        if reused is not None:
            tables.append(reused.select(SCHEMA.names).cast(SCHEMA))
        table = pa.concat_tables(tables)
        del tables
        if reused is not None:  # a listing alone is sorted
            table = table.sort_by("key")
        table = table.combine_chunks()
        return write_index(table, path, self.rules.identity())

    def _split(self, path: Path, listing: pa.Table) -> tuple[pa.Table | None, pa.Table]:
        """The old index's rows that are still right, and the listed files that must be read."""
        old = open_index(path)
        if old is None or not old.matches(self.rules.identity()):
            return None, listing
        places = pc.index_in(listing["key"].combine_chunks(), value_set=old.table["key"].combine_chunks())
        problems = old.table["problem"].take(places)
        # what could not be read is tried again: it may have been out of reach, which its version does not tell
        same = pc.fill_null(pc.or_(pc.equal(problems, ""), pc.equal(problems, NO_CAPTION)), False)
        for column in ("size", "version", "caption_version"):
            then = old.table[column].take(places)
            same = pc.and_(same, pc.fill_null(pc.equal(then, listing[column]), False))
        return old.table.take(pc.filter(places, same)), listing.filter(pc.invert(same))

    def _read(self, listing: pa.Table) -> Iterator[pa.RecordBatch]:
        if not len(listing):
            return
        with (
            self.progress(f"reading the files of {self.dataset!r}", len(listing)) as advance,
            ThreadPoolExecutor(self.workers) as pool,
        ):
            for batch in listing.to_batches(max_chunksize=CHUNK):
                rows = batch.to_pylist()
                read = [result for result in pool.map(self._read_one, rows) if advance(1) is None]
                yield self._to_batch(rows, read)

    def _read_one(self, row: dict[str, object]) -> Read:
        key, has_caption_file = str(row["key"]), bool(row["caption_version"])
        try:
            with self.backend.open(key) as stream:
                width, height = probe(stream)
            captions = self.rules.captions(key, self._caption_text(key) if has_caption_file else None)
        except (BrokenImage, ValueError) as error:
            return Read(problem=str(error))
        except (FileNotFoundError, PermissionError) as error:
            return Read(problem=error.strerror or str(error))
        return Read(width, height, captions) if captions else Read(problem=NO_CAPTION)

    def _caption_text(self, key: str) -> str:
        with self.backend.open(caption_key(key)) as stream:
            return read_text(stream.read())

    def _to_batch(self, rows: Sequence[dict[str, object]], read: Sequence[Read]) -> pa.RecordBatch:
        names = [f"{self.dataset}\x1f{row['key']}" for row in rows]
        draws = [int.from_bytes(digest(name)[:8], "little") for name in names]
        identities = [
            digest(f"{name}\x1f{row['size']}\x1f{row['version']}") for name, row in zip(names, rows, strict=True)
        ]
        columns = {
            **{name: [row[name] for row in rows] for name in ("key", "size", "version", "caption_version")},
            "width": [each.width for each in read],
            "height": [each.height for each in read],
            "draw": draws,
            "identity": identities,
            "captions": [each.captions for each in read],
            "digests": [[digest(caption) for caption in each.captions] for each in read],
            "problem": [each.problem for each in read],
        }
        return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def open_index(path: Path) -> Index | None:
    """The index that is there; None when there is none, or when it cannot be used (it is only a cache)."""
    try:
        return Index(path)
    except (FileNotFoundError, pa.ArrowInvalid, KeyError):
        return None


def write_index(table: pa.Table, path: Path, rules: str) -> Index:
    """Write an index whole or not at all, with what decides its content, and open it."""
    table = table.replace_schema_metadata({"rules": rules, "format": str(FORMAT)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with partial.open("wb") as stream:
        with pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync_folder(path.parent)
    return Index(path)


def describe_listing(backend: DataBackend, limit: int = 5) -> tuple[int, list[str]]:
    """How many objects a backend has, and the first few keys: what to say when no picture was found."""
    entries: list[Entry] = list(islice(backend.list(), 10_000))
    return len(entries), [entry.key for entry in entries[:limit]]
