# pyright: reportAttributeAccessIssue=false
"""The index of a dataset: one Arrow table on disk, memory-mapped, with a row for each picture (or prompt) found.

Nothing here grows a Python object per picture: the listing, the rows and their captions are Arrow columns, and what the
pipeline keeps in memory are numpy views of the mapped file. Rows of files that have not changed are taken over from the
index that was there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..backend import DataBackend, Entry, SampleBackend, SampleChunk
from ..errors import BadValue, UserError
from ..files import sync_folder
from .captions import CaptionRules, caption_key, read_text
from .hashing import UInt64s
from .images import SUFFIXES, BrokenImage, probe
from .progress import Progress
from .storage import partial_of

T = TypeVar("T")
FORMAT = 2
CHUNK = 8192

DIGEST = pa.binary(16)
FILES = pa.schema([("key", pa.large_string()), ("size", pa.int64()), ("version", pa.large_string())])
"""Files of a backend, as they are listed."""
LISTING = pa.schema(
    [
        *FILES,
        ("caption_version", pa.large_string()),
        ("place", pa.large_string()),
        ("texts", pa.large_list(pa.large_string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("problem", pa.large_string()),
    ]
)
"""Samples before their files are read: ``texts`` is null where captions stand in files, sizes are 0 where unknown."""
SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("size", pa.int64()),
        ("version", pa.large_string()),
        ("caption_version", pa.large_string()),
        ("place", pa.large_string()),
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
SAME_NAME = "another sample has the same name"


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
        self._problems, self._places = columns["problem"], columns["place"]
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

    def place(self, row: int | np.integer) -> str:
        """What the backend opens the picture by: its key, unless the backend says otherwise."""
        return self._places[int(row)].as_py() or self.key(row)

    def problem(self, row: int) -> str:
        """Why the row cannot be used; empty when it can."""
        return self._problems[int(row)].as_py()

    def caption(self, place: int) -> str:
        """A caption by its place among all captions."""
        return self._caption_texts[int(place)].as_py()

    def having(self, problem: str) -> NDArray[np.bool_]:
        """Which rows have this problem (empty: none at all), shape (n,)."""
        return pc.equal(self._problems, problem).to_numpy(zero_copy_only=False)

    def has_unread(self) -> bool:
        """Whether there are files that could not be read, which may have been out of reach only."""
        settled = pa.array(["", NO_CAPTION, SAME_NAME], pa.large_string())
        return not pc.all(pc.is_in(self._problems, value_set=settled)).as_py() if len(self) else False

    def matches(self, rules: str) -> bool:
        """Whether the captions were made by the same rules."""
        meta = self.table.schema.metadata or {}
        return meta.get(b"rules") == rules.encode() and meta.get(b"format") == str(FORMAT).encode()


def has_name(entry: Entry) -> bool:
    """Whether the key is text: a file name that is no UTF-8 cannot be written to a table, nor named in a message."""
    return entry.key.isprintable() or not any("\ud800" <= letter <= "\udfff" for letter in entry.key)


def _list_files(backend: DataBackend) -> tuple[pa.Table, pa.Table, int]:
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
            schema=FILES,
        )
        is_picture = pc.match_substring_regex(batch["key"], rf"(?i)\.({suffixes})$")
        pictures.append(batch.filter(is_picture))
        texts.append(batch.filter(pc.ends_with(batch["key"], ".txt")))
    return pa.Table.from_batches(pictures, FILES), pa.Table.from_batches(texts, FILES), nameless


def _with_captions(pictures: pa.Table, texts: pa.Table, rules: CaptionRules) -> pa.Table:
    """The listing of picture files: the version of each one's caption file, empty where there is none."""
    count = len(pictures)
    if rules.reads_files:
        keys = pc.replace_substring_regex(pictures["key"], r"\.[^./]*$", ".txt")
        found = pc.index_in(keys, value_set=texts["key"].combine_chunks())
        versions = pc.fill_null(texts["version"].take(found), "")
    else:
        versions = pa.repeat(pa.scalar("", pa.large_string()), count)
    empty, zeros = pa.repeat(pa.scalar("", pa.large_string()), count), pa.repeat(pa.scalar(0, pa.int32()), count)
    columns = {
        **{name: pictures[name] for name in FILES.names}, "caption_version": versions, "place": empty,
        "texts": pa.nulls(count, LISTING.field("texts").type), "width": zeros, "height": zeros, "problem": empty,
    }  # fmt: skip
    return pa.table(columns, schema=LISTING)


def _listed(chunk: SampleChunk) -> pa.RecordBatch:
    columns = {
        "key": chunk.keys, "size": chunk.sizes, "version": chunk.versions, "caption_version": [""] * len(chunk),
        "place": chunk.places, "texts": chunk.captions, "width": chunk.widths, "height": chunk.heights,
        "problem": chunk.problems,
    }  # fmt: skip
    return pa.RecordBatch.from_pydict(columns, schema=LISTING)


def _list_samples(backend: SampleBackend) -> pa.Table:
    """The listing of a backend that knows its samples, in sorted key order; names that come again are marked."""
    batches = map(_listed, backend.samples())
    table = pa.Table.from_batches(batches, LISTING).sort_by([("key", "ascending"), ("place", "ascending")])
    keys = table["key"].combine_chunks()
    again = pa.concat_arrays([pa.array([False] * min(1, len(keys))), pc.equal(keys[1:], keys[:-1])])
    problems = pc.if_else(again, SAME_NAME, table["problem"].combine_chunks())
    return table.set_column(table.schema.get_field_index("problem"), "problem", problems)


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
        """Write the index to `path`, reading only files that are new or have changed.

        Raises:
            UserError: The samples cannot be read.
        """
        try:
            if isinstance(self.backend, SampleBackend):
                return self._build_samples(self.backend, path)
            return self._build_files(path)
        except BadValue as error:
            raise UserError(f"data.{self.dataset}.{error}", error.remedy) from error

    def _build_samples(self, backend: SampleBackend, path: Path) -> Index:
        rules = json.dumps([self.rules.identity(), backend.identity()])
        old = open_index(path)
        if old is not None and old.matches(rules) and not old.has_unread():
            return old
        listing = _list_samples(backend)
        if old is not None:
            listing = _with_known_sizes(listing, old.table)
        self.num_read = len(listing)
        return write_index(pa.Table.from_batches(self._read(listing), SCHEMA).combine_chunks(), path, rules)

    def _build_files(self, path: Path) -> Index:
        pictures, texts, self.num_nameless = _list_files(self.backend)
        listing = _with_captions(pictures, texts, self.rules)
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

    def _read_one(self, row: dict[str, Any]) -> Read:
        if row["problem"]:
            return Read(problem=row["problem"])
        try:
            width, height = row["width"], row["height"]
            if not width or not height:
                with self.backend.open(row["place"] or row["key"]) as stream:
                    width, height = probe(stream)
            captions = self._captions(row)
        except (BrokenImage, ValueError) as error:
            return Read(problem=str(error))
        except (FileNotFoundError, PermissionError) as error:
            return Read(problem=error.strerror or str(error))
        return Read(width, height, captions) if captions else Read(problem=NO_CAPTION)

    def _captions(self, row: dict[str, Any]) -> list[str]:
        key = row["key"]
        if row["texts"] is not None:
            return self.rules.of_sample(key, row["texts"])
        return self.rules.captions(key, self._caption_text(key) if row["caption_version"] else None)

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
            **{name: [row[name] for row in rows] for name in ("key", "size", "version", "caption_version", "place")},
            "width": [each.width for each in read],
            "height": [each.height for each in read],
            "draw": draws,
            "identity": identities,
            "captions": [each.captions for each in read],
            "digests": [[digest(caption) for caption in each.captions] for each in read],
            "problem": [each.problem for each in read],
        }
        return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _with_known_sizes(listing: pa.Table, old: pa.Table) -> pa.Table:
    """The listing with widths and heights of pictures that have not changed since the old index was made."""
    places = pc.index_in(listing["key"].combine_chunks(), value_set=old["key"].combine_chunks())
    same = pc.equal(old["version"].take(places), listing["version"])
    for name in ("width", "height"):
        known = pc.fill_null(pc.if_else(same, old[name].take(places), 0), 0)
        given = pc.if_else(pc.equal(listing[name], 0), known, listing[name])
        listing = listing.set_column(listing.schema.get_field_index(name), LISTING.field(name), given.cast(pa.int32()))
    return listing


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
