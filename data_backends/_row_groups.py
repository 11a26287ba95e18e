# pyright: reportAttributeAccessIssue=false
"""Images inside Parquet tables by their row: row groups are read whole and kept in memory for a while."""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from ..core.data.tables.locations import Location
from ..core.data.tables.readers import bytes_inside
from ..core.errors import BadValue
from ..core.plugin_api.backend import SequentialChunk

KEPT_BYTES = 512 * 2**20
"""Bytes of images in row groups that are kept in memory, beside the one in use."""
LARGEST_GROUP = 2 * 2**30
"""Bytes of images in one row group at most."""


@dataclass(frozen=True)
class _Group:
    """A row group: its file, its number there, its first row among all, its number of rows, and the bytes of its
    images.
    """

    file: Location
    metadata: Any
    number: int
    first: int
    rows: int
    size: int


class RowGroups:
    """The images of some Parquet files, by row from 0 over all files.

    Args:
        key: The entry's key that names the files.
        files: The tables.
        column: The column of images.
    """

    def __init__(self, key: str, files: Sequence[Location], column: str) -> None:
        from pyarrow.parquet import read_metadata

        self._groups: list[_Group] = []
        self._columns: dict[str, str] = {}
        first = 0
        for file in files:
            with file.open() as stream:
                metadata = read_metadata(stream)
            self._columns[file.path] = name = bytes_inside(metadata.schema.to_arrow_schema(), column) or column
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                size = _size(group, name)
                if size > LARGEST_GROUP:
                    raise _too_large(key, file, number, size)
                self._groups.append(_Group(file, metadata, number, first, group.num_rows, size))
                first += group.num_rows
        self._starts = [group.first for group in self._groups]
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Future[pa.ChunkedArray]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """The bytes of all images."""
        return sum(group.size for group in self._groups)

    def open(self, row: int) -> BinaryIO:
        """Open the bytes of a row's image."""
        number = bisect_right(self._starts, row) - 1
        group = self._groups[number]
        if row >= group.first + group.rows:
            raise FileNotFoundError(f"the table has no row {row}")
        return _stream(self._images(number), row - group.first)

    def sequential(self, resume: str) -> Iterator[SequentialChunk]:
        """Yield all images, a row group at a time."""
        for number in range(int(resume or 0), len(self._groups)):
            group = self._groups[number]
            images = self._read(group)
            positions = range(group.first, group.first + group.rows)
            openers = [partial(_stream, images, row) for row in range(group.rows)]
            yield SequentialChunk(positions, openers, positions.stop, str(number + 1))

    def _images(self, number: int) -> pa.ChunkedArray:
        """Return the images of a row group, which is read once although many threads ask."""
        with self._lock:
            known = self._kept.get(number)
            future = self._kept.setdefault(number, Future())
            self._kept.move_to_end(number)
            self._forget()
        if known is None:
            self._fulfil(number, future, lambda: self._read(self._groups[number]))
        return future.result()

    def _fulfil(self, number: int, future: Future[pa.ChunkedArray], read: Callable[[], pa.ChunkedArray]) -> None:
        try:
            future.set_result(read())
        except BaseException as error:
            with self._lock:
                self._kept.pop(number, None)  # whoever asks next tries again
            future.set_exception(error)
            raise

    def _forget(self) -> None:
        while len(self._kept) > 1 and sum(self._groups[number].size for number in self._kept) > KEPT_BYTES:
            self._kept.popitem(last=False)

    def _read(self, group: _Group) -> pa.ChunkedArray:
        from pyarrow.parquet import ParquetFile

        name = self._columns[group.file.path]
        with group.file.open() as stream:
            table = ParquetFile(stream, metadata=group.metadata).read_row_group(group.number, columns=[name])
        column = table.column(0)
        while pa.types.is_struct(column.type):
            inside = [pc.struct_field(chunk, [0]) for chunk in column.chunks]
            column = pa.chunked_array(inside, column.type.field(0).type)
        return column


def _stream(images: pa.ChunkedArray, row: int) -> BinaryIO:
    data = images[row].as_py()
    if data is None:
        raise FileNotFoundError(f"row {row} of its row group has no bytes")
    return io.BytesIO(data)


def _size(group: Any, name: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)


def _too_large(key: str, file: Location, number: int, size: int) -> BadValue:
    problem = f"row group {number} holds {size / 2**30:.1f} GiB of images, and one of them is read with all"
    remedy = "write the table again in row groups of some hundred rows: row_group_size=100"
    return BadValue(key, file.path, problem, remedy)
