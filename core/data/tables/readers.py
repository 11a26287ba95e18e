# pyright: reportAttributeAccessIssue=false
"""Readers of CSV, JSON lines and Parquet tables, a few rows and some columns at a time, wherever the files lie."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from ...errors import BadValue
from ...utils.prompt_library import shortened
from .columns import Columns, Row, names_in
from .external_sort import CHUNK, in_chunks
from .separated import records

BATCH_BYTES = 64 * 2**20
"""Approximate size of the batches in which Parquet tables are read."""
LINES_ASKED = 100
"""Lines of a JSON lines table that are read to find its columns."""


@dataclass(frozen=True)
class TableFile:
    """One file that holds a table.

    Attributes:
        key: The entry's key that names it.
        path: Its path or URL, for messages.
        open: Opens the file at its beginning, seekable.
    """

    key: str
    path: str
    open: Callable[[], BinaryIO]

    def bad(self, problem: str, remedy: str) -> BadValue:
        """Make the error that the file cannot be used."""
        return BadValue(self.key, self.path, problem, remedy)

    @contextmanager
    def reading(self, remedy: str) -> Iterator[None]:
        """Turn errors inside the block into BadValue."""
        try:
            yield
        except FileNotFoundError as error:
            remedy = "give a file that is there (a relative path is relative to its file)"
            raise self.bad("does not exist", remedy) from error
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
            raise self.bad(problem, "give a readable file, not a folder") from error
        except (ValueError, pa.ArrowException) as error:
            raise self.bad(reason(error), remedy) from error


def reason(error: Exception) -> str:
    """Describe in one line what is wrong with a file."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start})"
    return " ".join(str(error).split())[:300]


@dataclass(frozen=True)
class Rows:
    """Some rows of a table.

    Attributes:
        numbers: Lines (of JSON lines) or rows (of the others), counted from 1, for people.
        rows: Values of the columns that were asked for.
        group: For Parquet, the row group that holds all of them.
        start: For Parquet, the position of the first one in that row group.
    """

    numbers: Sequence[int]
    rows: Sequence[Row]
    group: int = 0
    start: int = 0


class Table(ABC):
    """A table in one file.

    Args:
        file: The file that holds it.
    """

    remedy: str
    """The remedy for a file that cannot be read."""
    noun: str = "row"
    """The word for one of its rows in messages."""

    def __init__(self, file: TableFile) -> None:
        self.file = file

    def columns(self) -> Columns:
        """Return the columns that there are; an empty file has none.

        Raises:
            BadValue: The file is not there or cannot be read.
        """
        with self.file.reading(self.remedy):
            return self._columns()

    def rows(self, columns: Sequence[str]) -> Iterator[Rows]:
        """Yield all rows in order, with at least these columns. Raises BadValue."""
        with self.file.reading(self.remedy):
            yield from self._rows(columns)

    def empty(self) -> BadValue:
        """Make the error that the file is empty."""
        return self.file.bad("is empty", self.remedy)

    def holds_bytes(self, column: str) -> bool:
        """Return whether a column holds bytes, or structs with bytes, rather than texts."""
        del column
        return False

    @abstractmethod
    def _columns(self) -> Columns: ...

    @abstractmethod
    def _rows(self, columns: Sequence[str]) -> Iterator[Rows]: ...

    @property
    def _name(self) -> str:
        return self.file.path.rpartition("/")[2]


class CsvTable(Table):
    """Separated values with the columns' names in the first line; commas are usual, and tabs in a .tsv file."""

    remedy = "write a first line with the columns' names, texts with commas in double quotes, as UTF-8"

    @property
    def _usual(self) -> str:
        return "\t" if self.file.path.lower().endswith(".tsv") else ","

    def _columns(self) -> Columns:
        with self.file.open() as stream:
            header = next(records(stream, usual=self._usual), [])
        return Columns(header, f"the first line of {self._name}")

    def _rows(self, columns: Sequence[str]) -> Iterator[Rows]:
        with self.file.open() as stream:
            found = records(stream, usual=self._usual)
            header, number = next(found, []), 1
            wanted = [(name, header.index(name)) for name in columns]
            for chunk in in_chunks(found, CHUNK):
                rows = [{name: values[at] for name, at in wanted} for values in chunk]
                yield Rows(range(number, number + len(rows)), rows)
                number += len(rows)


class JsonLinesTable(Table):
    """A table with an object on each line; empty lines are skipped."""

    noun = "line"
    remedy = 'write one object per line, as {"caption": "a cat"}, as UTF-8'

    def _columns(self) -> Columns:
        found: dict[str, None] = {}
        lines = []
        for number, row in islice(self._objects(), LINES_ASKED):
            lines.append(number)
            found |= dict.fromkeys(names_in(row))
        which = f"line {lines[0]}" if len(lines) == 1 else f"lines {lines[0]} to {lines[-1]}" if lines else "it"
        return Columns(list(found), f"{which} of {self._name}")

    def _rows(self, columns: Sequence[str]) -> Iterator[Rows]:
        for chunk in in_chunks(self._objects(), CHUNK):
            yield Rows([number for number, _ in chunk], [row for _, row in chunk])

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self.file.open() as stream:
            for number, line in enumerate(stream, 1):
                text = decoded_line(line, number)
                if text.strip():
                    yield number, _object(text, number)


def decoded_line(line: bytes, number: int) -> str:
    """Decode a line. Raises ValueError that names the line."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} is not UTF-8 (byte {error.start})") from error


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno} is not JSON: {error.msg}") from error
    if not isinstance(found, dict):
        raise ValueError(f"line {number} is {shortened(found)}, not an object")
    if "\\ud" in line.lower():
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"line {number} has half of a surrogate pair, which is no text") from error
    return found


class ParquetTable(Table):
    """Apache Parquet; a column inside a struct is read without the rest of the struct."""

    remedy = "write the table again, with a column of texts"

    def _columns(self) -> Columns:
        from pyarrow.parquet import read_schema

        with self.file.open() as stream:
            schema = read_schema(stream)
        names = [name for field in schema for name in (field.name, *_nested(field.type, f"{field.name}."))]
        return Columns(names, self._name)

    def holds_bytes(self, column: str) -> bool:
        """Return whether a column holds bytes, or structs with bytes, rather than texts."""
        from pyarrow.parquet import read_schema

        with self.file.reading(self.remedy), self.file.open() as stream:
            return bytes_inside(read_schema(stream), column) is not None

    def _rows(self, columns: Sequence[str]) -> Iterator[Rows]:
        from pyarrow.parquet import ParquetFile

        with self.file.open() as stream:
            file = ParquetFile(stream)
            wanted = list(dict.fromkeys(readable(file.schema_arrow, name) for name in columns))
            number = 1
            for group in range(file.num_row_groups):
                start = 0
                size = _batch_size(file.metadata.row_group(group))
                for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=wanted):
                    rows = batch.to_pylist() if wanted else [{}] * len(batch)
                    yield Rows(range(number, number + len(rows)), rows, group, start)
                    number, start = number + len(rows), start + len(rows)


def _nested(kind: pa.DataType, prefix: str) -> Iterator[str]:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        for field in kind:
            yield prefix + field.name
            yield from _nested(field.type, f"{prefix}{field.name}.")


def readable(schema: pa.Schema, name: str) -> str:
    """Return the name of the smallest Parquet column that holds `name`: the reader reaches into structs, not into
    lists.
    """
    if name in schema.names:
        return name
    parts = name.split(".")
    kind, reached = schema.field(parts[0]).type, parts[:1]
    for part in parts[1:]:
        if not pa.types.is_struct(kind):
            break
        kind, reached = kind.field(part).type, [*reached, part]
    return ".".join(reached)


def bytes_inside(schema: pa.Schema, name: str) -> str | None:
    """Return the name of the column of bytes (itself, or ``bytes`` inside its structs); None if it holds something
    else.
    """
    kind = schema.field(name).type if name in schema.names else _kind(schema, name.split("."))
    if kind is not None and pa.types.is_struct(kind):
        name, kind = f"{name}.bytes", _kind(kind, ["bytes"])
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_bytes = kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
    return name if is_bytes else None


def _kind(outer: Any, path: Sequence[str]) -> pa.DataType | None:
    """Return the type of the field that a path of names leads to; None where there is no such field."""
    for name in path:
        if not (isinstance(outer, pa.Schema) or pa.types.is_struct(outer)) or name not in {each.name for each in outer}:
            return None
        outer = outer.field(name).type
    return outer


def _batch_size(group: Any) -> int:
    per_row = group.total_byte_size // max(1, group.num_rows)
    return max(1, min(CHUNK, BATCH_BYTES // max(1, per_row)))


TABLES: dict[str, type[Table]] = {".jsonl": JsonLinesTable, ".csv": CsvTable, ".parquet": ParquetTable}
"""Kinds of tables, by the suffix that their files usually have."""
