# pyright: reportAttributeAccessIssue=false
"""Tables larger than memory: columns that grow on disk and are mapped once they are complete, and an external merge
sort.

Memory is that of a few batches, however many rows there are. Columns are free of nulls.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...utils.files import write_whole

T = TypeVar("T")
CHUNK = 8192
"""Rows that are processed at a time."""
RUN_ROWS = 1 << 17
"""Rows that are sorted in memory at a time."""
MERGE_ROWS = 1 << 18
"""Rows that a merge holds of all runs together."""
SMALLEST_BATCH = 256


class OnDiskTable:
    """A table under construction, in which each buffer of each column is a growing file.

    Args:
        schema: Schema of all batches.
        folder: Holds the files; made here, removed by its owner.
    """

    def __init__(self, schema: pa.Schema, folder: Path) -> None:
        folder = folder / uuid4().hex[:12]
        folder.mkdir(parents=True)
        self.schema, self.num_rows = schema, 0
        self._columns = [_Column(field.type, folder / f"{number}") for number, field in enumerate(schema)]

    def append(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        for column, array in zip(self._columns, batch.columns, strict=True):
            column.append(array)
        self.num_rows += len(batch)

    def extend(self, batches: Iterable[pa.RecordBatch]) -> OnDiskTable:
        """Append all of `batches`."""
        for batch in batches:
            self.append(batch)
        return self

    def table(self) -> pa.Table:
        """Return all rows as memory-mapped columns of one chunk each; nothing can be appended afterwards."""
        return pa.table([column.close() for column in self._columns], schema=self.schema)


class _Column:
    """The buffers of one column: data, and for texts and lists the offsets at which each begins."""

    def __init__(self, kind: pa.DataType, stem: Path) -> None:
        self.kind, self.length, self._stem = kind, 0, stem
        self._child = _Column(kind.value_type, stem.with_name(f"{stem.name}v")) if _is_list(kind) else None
        self._ends = stem.with_suffix(".ends").open("wb") if self._child or _is_text(kind) else None
        self._data = None if self._child else stem.with_suffix(".data").open("wb")
        self._total = 0
        if self._ends is not None:
            self._ends.write(bytes(8))

    def append(self, array: pa.Array) -> None:
        assert array.type == self.kind, (array.type, self.kind)
        assert not array.null_count, "a table on disk keeps no nulls"
        self.length += len(array)
        if self._child is not None:
            offsets = array.offsets.to_numpy()
            self._child.append(array.values[int(offsets[0]) : int(offsets[-1])])
            self._append_ends(offsets)
        elif self._ends is not None:
            offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
            if len(array):
                self._write(array.buffers()[2], int(offsets[0]), int(offsets[-1]))
                self._append_ends(offsets)
        else:
            width = self.kind.bit_width // 8
            self._write(array.buffers()[1], array.offset * width, (array.offset + len(array)) * width)

    def _append_ends(self, offsets: np.ndarray) -> None:
        assert self._ends is not None
        self._ends.write((offsets[1:] - (offsets[0] - self._total)).astype(np.int64).tobytes())
        self._total += int(offsets[-1] - offsets[0])

    def _write(self, buffer: pa.Buffer | None, start: int, end: int) -> None:
        if buffer is not None and end > start:
            assert self._data is not None
            self._data.write(memoryview(buffer)[start:end])

    def close(self) -> pa.Array:
        """Return the column, memory-mapped."""
        if self._child is not None:
            assert self._ends is not None
            offsets = pa.Array.from_buffers(pa.int64(), self.length + 1, [None, _mapped(self._ends)])
            return pa.LargeListArray.from_arrays(offsets, self._child.close())
        ends = [] if self._ends is None else [_mapped(self._ends)]
        assert self._data is not None
        return pa.Array.from_buffers(self.kind, self.length, [None, *ends, _mapped(self._data)])


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_large_string(kind)


def _mapped(stream: BinaryIO) -> pa.Buffer:
    stream.close()
    if not Path(stream.name).stat().st_size:  # nothing can be mapped
        return pa.py_buffer(b"")
    with pa.memory_map(stream.name) as source:
        return source.read_buffer()


# -- sorting ----------------------------------------------------------------------------------------------------------


def open_run(path: Path) -> pa.Table:
    """Map a file of :func:`write_run`, which may be removed afterwards."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def write_run(
    batches: Sequence[pa.RecordBatch], by: Sequence[str], schema: pa.Schema, path: Path, **metadata: str
) -> pa.Table:
    """Sort some batches together, write them as one file, whole or not at all, and open it."""
    table = _sorted(pa.Table.from_batches(batches, schema).combine_chunks(), by).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write_whole(path, sink.getvalue())
    return open_run(path)


def _sorted(table: pa.Table, by: Sequence[str]) -> pa.Table:
    """Sort a table of one chunk; a table that is sorted already, as most listings are, is returned as it is."""
    first = table[by[0]].chunk(0) if len(table) else []
    if len(first) < 2 or pc.all(pc.less(first[:-1], first[1:])).as_py():
        return table
    return table.sort_by([(name, "ascending") for name in by]).combine_chunks()


def write_runs(batches: Iterable[pa.RecordBatch], by: Sequence[str], schema: pa.Schema, folder: Path) -> list[pa.Table]:
    """Write sorted runs of :data:`RUN_ROWS` rows each into files of `folder`."""
    runs, waiting = [], []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= RUN_ROWS:
            runs.append(write_run(waiting, by, schema, folder / f"{uuid4().hex}.run"))
            waiting = []
    return [*runs, write_run(waiting, by, schema, folder / f"{uuid4().hex}.run")]


class _Run:
    """A sorted table that is read a few rows at a time."""

    def __init__(self, table: pa.Table, by: Sequence[str], rows: int) -> None:
        self._table, self._by, self._rows, self._start = table, by, rows, 0
        self._load()

    def _load(self) -> None:
        self._use(self._table.slice(self._start, self._rows).combine_chunks())
        self._start += len(self._head)
        if len(self._head):
            self.last = self._value(len(self._head) - 1)

    def _use(self, head: pa.Table) -> None:
        self._head, self._columns = head, [head[name] for name in self._by]
        if len(head):
            self.first = self._value(0)

    def _value(self, row: int) -> tuple[str, ...]:
        return tuple(column[row].as_py() for column in self._columns)

    def __bool__(self) -> bool:
        return len(self._head) > 0

    def take(self, limit: tuple[str, ...]) -> pa.Table:
        """Return the rows up to and with `limit` among those that are loaded."""
        count = bisect_right(range(len(self._head)), limit, key=self._value)
        taken = self._head.slice(0, count)
        self._use(self._head.slice(count))
        if not len(self._head):
            self._load()
        return taken


def merged(runs: Sequence[pa.Table], by: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the rows of sorted tables in one sorted order."""
    rows = max(SMALLEST_BATCH, MERGE_ROWS // max(1, len(runs)))
    active = [run for run in (_Run(table, by, rows) for table in runs) if run]
    while active:
        # nothing that is not loaded yet comes before the last row of any run
        limit = min(run.last for run in active)
        table = pa.concat_tables([run.take(limit) for run in active if run.first <= limit]).combine_chunks()
        yield from _sorted(table, by).replace_schema_metadata(None).cast(schema).to_batches()
        active = [run for run in active if run]


def sorted_table(batches: Iterable[pa.RecordBatch], by: Sequence[str], schema: pa.Schema, folder: Path) -> pa.Table:
    """Sort all rows of `batches` by text columns; the result is mapped from files in `folder`."""
    return merge_table(write_runs(batches, by, schema, folder), by, schema, folder)


def merge_table(runs: Sequence[pa.Table], by: Sequence[str], schema: pa.Schema, folder: Path) -> pa.Table:
    """Merge sorted tables into one, mapped from files in `folder`."""
    return OnDiskTable(schema, folder).extend(merged(runs, by, schema)).table()


def joined(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, without a copy where it has one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def between(table: pa.Table, column: str, low: str, high: str) -> pa.Table:
    """Return the rows of a table sorted by `column` whose values lie in [low, high]."""
    values, rows = table[column], range(len(table))
    start = bisect_left(rows, low, key=lambda row: values[row].as_py())
    end = bisect_right(rows, high, lo=start, key=lambda row: values[row].as_py())
    return table.slice(start, end - start)


def in_chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last one may be shorter."""
    while chunk := list(islice(items, size)):
        yield chunk
