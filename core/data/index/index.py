# pyright: reportAttributeAccessIssue=false
"""The index of a dataset: one Arrow table on disk, memory-mapped, with a row for each image (or prompt) found.

Nothing here grows a Python object per image: the listing, the rows and their captions are Arrow columns, and what the
pipeline keeps in memory are numpy views of the mapped file. Rows of files that have not changed are taken over from the
index that was there.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...plugin_api.backend import DataBackend, Entry
from ...utils.files import whole_file
from ..hashing import UInt64s
from ..mapped import release
from ..tables.external_sort import OnDiskTable, joined

FORMAT = 3

DIGEST = pa.binary(16)
SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("size", pa.int64()),
        ("version", pa.large_string()),
        ("caption_version", pa.large_string()),
        ("position", pa.large_string()),
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
FILTERED = "it does not meet the dataset's conditions"
"""Problem of samples that the source itself filters out; they are left out on purpose."""
SAME_NAME = "another sample has the same name"


def as_keys(array: pa.Array) -> UInt64s:
    """View a column of 16-byte hashes as unsigned integers of shape (n, 2), without a copy."""
    raw = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint64)
    return raw[2 * array.offset : 2 * (array.offset + len(array))].reshape(-1, 2)


class Index:
    """A memory-mapped index.

    Attributes:
        width: Upright width in pixels, 0 for files with a problem, -1 where they were out of reach; shape (n,).
        height: Upright height in pixels; shape (n,).
        draw: Hash of dataset id and key, which seeds the fixed random choices about an image; shape (n,).
        identity: Hash of dataset id, key, size and version of the file; shape (n, 2).
        caption_offsets: Captions of row i are [caption_offsets[i], caption_offsets[i + 1]); shape (n + 1,).
        caption_digests: Hashes of all captions; shape (m, 2).
        caption_texts: All captions, an Arrow column.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as source:
            self.table = pa.ipc.open_file(source).read_all()
            source.seek(0)
            self._file = source.read_buffer()
        columns = {name: joined(self.table.column(name)) for name in SCHEMA.names}
        self._keys, self._captions = columns["key"], columns["captions"]
        self._problems, self._positions = columns["problem"], columns["position"]
        self.width: NDArray[np.int32] = columns["width"].to_numpy()
        self.height: NDArray[np.int32] = columns["height"].to_numpy()
        self.draw: UInt64s = columns["draw"].to_numpy()
        self.identity = as_keys(columns["identity"])
        self.caption_offsets: NDArray[np.int64] = self._captions.offsets.to_numpy()
        self.caption_texts = self._captions.values
        self.caption_digests = as_keys(columns["digests"].values)

    def __len__(self) -> int:
        return len(self._keys)

    def release(self) -> None:
        """Give the pages that were read back to the system."""
        release(self._file.address, self._file.size)

    def key(self, row: int | np.integer) -> str:
        """Return the image's key in its backend."""
        return self._keys[int(row)].as_py()

    def position(self, row: int | np.integer) -> str:
        """Return the key that the backend opens the image by: the image's own, unless the backend gave another."""
        return self._positions[int(row)].as_py() or self.key(row)

    def problem(self, row: int) -> str:
        """Return why the row cannot be used; empty if it can."""
        return self._problems[int(row)].as_py()

    def caption(self, position: int) -> str:
        """Return a caption by its position among all captions."""
        return self.caption_texts[int(position)].as_py()

    def rows_of(self, keys: Iterable[str]) -> NDArray[np.int64]:
        """Return the rows of a few images; those that are not there are left out."""
        named = pa.array(list(keys), pa.large_string())
        return np.flatnonzero(pc.is_in(self._keys, value_set=named).to_numpy(zero_copy_only=False))

    def having(self, problem: str) -> NDArray[np.bool_]:
        """Return a mask of the rows that have this problem (empty: no problem), shape (n,)."""
        return pc.equal(self._problems, problem).to_numpy(zero_copy_only=False)

    def has_unread(self) -> bool:
        """Return whether there are files that were out of reach and are to be tried again."""
        return bool((self.width < 0).any())

    def matches(self, rules: str, source: str = "") -> bool:
        """Return whether the captions were made by the same rules, and of the same source where one is named."""
        meta = self.table.schema.metadata or {}
        wanted = {b"rules": rules.encode(), b"format": str(FORMAT).encode()}
        same = all(meta.get(name) == value for name, value in wanted.items())
        return same and (not source or meta.get(b"source") == source.encode())


def open_index(path: Path) -> Index | None:
    """Open an index; return None where there is none or it cannot be used (it is only a cache)."""
    try:
        return Index(path)
    except (FileNotFoundError, pa.ArrowInvalid, KeyError):
        return None


def write_index(batches: Iterable[pa.RecordBatch], path: Path, rules: str, source: str = "", *, folder: Path) -> Index:
    """Write an index whole or not at all, with what decides its content, and open it.

    Rows go to files in `folder` as they come: the memory is that of one batch.
    """
    table = OnDiskTable(SCHEMA, folder).extend(batches).table()
    table = table.replace_schema_metadata({"rules": rules, "source": source, "format": str(FORMAT)})
    with whole_file(path) as partial, partial.open("wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    return Index(path)


def describe_listing(backend: DataBackend, limit: int = 5) -> tuple[int, list[str]]:
    """Return how many objects a backend has, and the first few keys, for the message that no image was found."""
    entries: list[Entry] = list(islice(backend.list(), 10_000))
    return len(entries), [entry.key for entry in entries[:limit]]
