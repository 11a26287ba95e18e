# pyright: reportAttributeAccessIssue=false
"""Prompts without pictures, read in columns from one file or from a folder of .txt files.

A :class:`PromptSource` is all that the rest of the data path knows of where prompts come from.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Protocol

import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json

from ..backend import DataBackend, Entry, SampleBackend
from ..errors import BadValue
from ..names import nearest
from ..prompts import json_texts, shortened
from .captions import read_text
from .index import CHUNK, in_chunks
from .threads import threads
from .vetting import named

if TYPE_CHECKING:
    from ..config.dataset_settings import DatasetSettings

COLUMNS = ("caption", "text")
"""Columns that are looked for where ``caption_column`` names none."""
JSONL_BLOCK_BYTES = 16 * 2**20
"""Longest line of a .jsonl file."""
FILES_AT_ONCE = 256


@dataclass(frozen=True)
class Chunk:
    """Some prompts, in columns of one length.

    Attributes:
        keys: Names that stay as long as the prompt stays at its place.
        texts: As they stand there; None where there is none.
        problems: Why a text could not be read; empty where it could.
    """

    keys: list[str]
    texts: list[str | None]
    problems: list[str]


class PromptSource(Protocol):
    """Where the prompts of one dataset come from."""

    def identity(self) -> str:
        """A text that changes whenever the prompts may have."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """All prompts in order. Raises BadValue."""
        ...


def open_source(backend: DataBackend, settings: DatasetSettings, *, workers: int = 1) -> PromptSource:
    """The prompts of a dataset: of its samples, of its one file, or of the .txt files of its folder."""
    if isinstance(backend, SampleBackend):
        return SampleCaptions(backend)
    if backend.prompts_key is not None:
        return FileSource(backend, backend.prompts_key, settings.caption_column)
    return FolderSource(backend, whole_files=settings.disable_multiline_split, workers=workers)


def _version(entries: Sequence[Entry], *more: object) -> str:
    hasher = blake2b(json.dumps(more).encode(), digest_size=16)
    for entry in entries:
        hasher.update(json.dumps([entry.key, entry.size, entry.version]).encode())
    return hasher.hexdigest()


# -- samples ----------------------------------------------------------------------------------------------------------


class SampleCaptions:
    """The captions of a backend that knows its samples: a prompt for each text."""

    def __init__(self, backend: SampleBackend) -> None:
        self.backend = backend

    def identity(self) -> str:
        """What the backend says of its samples."""
        return self.backend.identity()

    def chunks(self) -> Iterator[Chunk]:
        """Keys are the samples' names, with a number where a sample has several texts."""
        for samples in self.backend.samples(pictures=False):
            rows = [
                row
                for each in zip(samples.keys, samples.captions, samples.problems, strict=True)
                for row in _texts(*each)
            ]
            yield Chunk([key for key, _, _ in rows], [text for _, text, _ in rows], [why for _, _, why in rows])


def _texts(key: str, texts: Sequence[str], problem: str) -> list[tuple[str, str | None, str]]:
    if len(texts) < 2 or problem:
        return [(key, texts[0] if texts else None, problem)]
    return [(f"{key}#{number}", text, "") for number, text in enumerate(texts)]


# -- a folder ---------------------------------------------------------------------------------------------------------


class FolderSource:
    """All .txt files of a backend, recursively: a prompt per line, or per file. What is no UTF-8 is set aside.

    Args:
        backend: Where they are.
        whole_files: Whether the lines of a file make one prompt.
        workers: Threads that read files.
    """

    def __init__(self, backend: DataBackend, *, whole_files: bool, workers: int) -> None:
        self.backend, self.whole_files, self.workers = backend, whole_files, max(1, workers, backend.parallel_reads)
        self._entries: list[Entry] | None = None

    def _files(self) -> list[Entry]:
        if self._entries is None:
            self._entries = [entry for entry in map(named, self.backend.list()) if entry.key.endswith(".txt")]
        return self._entries

    def identity(self) -> str:
        """Names, sizes and versions of the files."""
        return _version(self._files(), self.whole_files)

    def chunks(self) -> Iterator[Chunk]:
        """Keys are ``a/b.txt:3``, or ``a/b.txt`` where files are prompts."""
        files = self._files()
        if not files:
            folder, file = self.backend.place_keys
            remedy = f"give the folder with the .txt files, or one file as {file}"
            raise BadValue(folder, self.backend.location, "holds no .txt file", remedy)
        with threads(self.workers) as pool:
            for part in in_chunks(iter(files), FILES_AT_ONCE):
                rows = [row for rows in pool.map(self._read, part) for row in rows]
                yield Chunk([key for key, _, _ in rows], [text for _, text, _ in rows], [why for _, _, why in rows])

    def _read(self, entry: Entry) -> list[tuple[str, str | None, str]]:
        if entry.problem:
            return [(entry.key, None, entry.problem)]
        try:
            with self.backend.open(entry.key) as stream:
                text = read_text(stream.read(), what="it")
        except ValueError as error:
            return [(entry.key, None, str(error))]
        except OSError as error:
            return [(entry.key, None, error.strerror or str(error))]
        if self.whole_files or not text.strip():
            return [(entry.key, text, "")]
        lines = enumerate(text.splitlines(), 1)
        return [(f"{entry.key}:{number}", line, "") for number, line in lines if line.strip()]


# -- one file ---------------------------------------------------------------------------------------------------------

Numbered = tuple[list[int], list[str | None]]
"""Line or row numbers, counted from 1, and the texts there."""


class FileSource:
    """One file of a backend.

    Args:
        backend: Where it is.
        key: Its key.
        column: The column of a table; None for the usual ones.
    """

    def __init__(self, backend: DataBackend, key: str, column: str | None) -> None:
        self.backend, self.key, self.column = backend, key, column
        self.suffix = PurePosixPath(key).suffix.lower()

    def identity(self) -> str:
        """Name, size and version of the file."""
        try:
            return _version([self.backend.entry(self.key)], self.column)
        except OSError as error:
            raise self._unreadable(error) from error

    def chunks(self) -> Iterator[Chunk]:
        """Keys are line or row numbers, counted from 1."""
        if self.suffix not in READERS:
            remedy = "write one prompt per line into a .txt file"
            raise self._bad(f"has the suffix {self.suffix!r}; {', '.join(READERS)} are read", remedy)
        if self.column is not None and self.suffix not in TABLES:
            problem = f"{self.key} is no table: columns are in {', '.join(TABLES)}"
            raise BadValue("caption_column", self.column, problem, "leave caption_column out")
        found = False
        try:
            for numbers, texts in READERS[self.suffix](self):
                found = found or bool(numbers)
                yield Chunk([str(number) for number in numbers], texts, [""] * len(numbers))
        except OSError as error:
            raise self._unreadable(error) from error
        except (ValueError, pa.ArrowException) as error:
            raise self._bad(_reason(error), _REMEDIES[self.suffix]) from error
        if not found:
            raise self._bad("is empty: there is no prompt in it", _REMEDIES[self.suffix])

    def open(self) -> BinaryIO:
        """The file from its beginning."""
        return self.backend.open(self.key)

    def _bad(self, problem: str, remedy: str) -> BadValue:
        return BadValue(self.backend.place_keys[1], self.backend.location, problem, remedy)

    def _unreadable(self, error: OSError) -> BadValue:
        if isinstance(error, FileNotFoundError):
            return self._bad("does not exist", "give a file that is there (a relative path is relative to its file)")
        return self._bad(f"cannot be read: {error.strerror or error}", "give a readable file, not a folder")

    def choose(self, columns: Sequence[str], where: str) -> str:
        """The column to read. Raises BadValue, with the columns that there are."""
        wanted = [self.column] if self.column is not None else list(COLUMNS)
        chosen = next((name for name in wanted if name in columns), None)
        if chosen is not None:
            return chosen
        close = next((match for name in wanted if (match := nearest(name, columns))), None)
        remedy = f"did you mean {close!r}? " if close else ""
        missing = " or ".join(repr(name) for name in wanted)
        problem = f"{where} has no column {missing}; it has {', '.join(map(repr, columns)) or 'none'}"
        raise BadValue("caption_column", self.column, problem, f"{remedy}name one of them as caption_column")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start})"
    return " ".join(str(error).split())[:300]


def _read_lines(source: FileSource) -> Iterator[Numbered]:
    with source.open() as stream:
        for chunk in in_chunks(enumerate(stream, 1), CHUNK):
            kept = [(number, text) for number, line in chunk if (text := _decoded(line, number).strip())]
            yield [number for number, _ in kept], [text for _, text in kept]


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} is not UTF-8 (byte {error.start})") from error


def _read_json(source: FileSource) -> Iterator[Numbered]:
    with source.open() as stream:
        texts: list[str | None] = [*json_texts(stream.read().decode("utf-8-sig"))]
    yield list(range(1, len(texts) + 1)), texts


def _numbered(batches: Iterator[pa.RecordBatch], column: str) -> Iterator[Numbered]:
    """Rows of a table by number, one column of it."""
    first = count(1)
    for batch in batches:
        texts: list[str | None] = batch.column(column).to_pylist()
        yield [next(first) for _ in texts], texts


def _read_csv(source: FileSource) -> Iterator[Numbered]:
    with source.open() as stream, io.TextIOWrapper(stream, "utf-8-sig", "replace", "") as text:
        header = next(csv.reader(text), [])
    if not header:
        return
    column = source.choose(header, f"the first line of {source.key}")
    convert = arrow_csv.ConvertOptions(column_types={column: pa.large_string()}, include_columns=[column])
    parse = arrow_csv.ParseOptions(newlines_in_values=True)
    read = arrow_csv.ReadOptions(use_threads=False)  # with threads, errors do not name the row
    with (
        source.open() as stream,
        arrow_csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert) as reader,
    ):
        yield from _numbered(iter(reader), column)


def _read_jsonl(source: FileSource) -> Iterator[Numbered]:
    with source.open() as stream:
        first = next(((number, line) for number, line in enumerate(stream, 1) if line.strip()), None)
    if first is None:
        return
    column = source.choose(list(_object(_decoded(first[1], first[0]), first[0])), f"line {first[0]} of {source.key}")
    parse = arrow_json.ParseOptions(
        explicit_schema=pa.schema([(column, pa.large_string())]), unexpected_field_behavior="ignore"
    )
    read = arrow_json.ReadOptions(block_size=JSONL_BLOCK_BYTES)
    try:
        with source.open() as stream:
            table = arrow_json.read_json(stream, parse_options=parse, read_options=read)
        table.validate(full=True)  # texts that are no UTF-8
    except pa.ArrowInvalid:
        _explain_jsonl(source, column)
        raise
    yield from _numbered(iter(table.to_batches(max_chunksize=CHUNK)), column)


def _object(line: str, number: int) -> dict[str, object]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno} is not JSON: {error.msg}") from error
    if not isinstance(found, dict):
        raise ValueError(f"line {number} is {shortened(found)}, not an object")
    return found


def _explain_jsonl(source: FileSource, column: str) -> None:
    """Raise ValueError for the first line that cannot be used: Arrow counts rows of a block, not lines."""
    with source.open() as stream:
        for number, line in enumerate(stream, 1):
            text = _decoded(line, number)
            value = _object(text, number).get(column) if text.strip() else None
            if not isinstance(value, str | None):
                raise ValueError(f"line {number}: {column!r} is {shortened(value)}, not a text")


def _read_parquet(source: FileSource) -> Iterator[Numbered]:
    from pyarrow.parquet import ParquetFile

    with source.open() as stream:
        file = ParquetFile(stream)
        column = source.choose(file.schema_arrow.names, source.key)
        kind = file.schema_arrow.field(column).type
        inner = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)):
            problem = f"the column {column!r} of {source.key} holds {kind}, not texts"
            raise BadValue("caption_column", source.column, problem, "name a column of texts as caption_column")
        yield from _numbered(file.iter_batches(batch_size=CHUNK, columns=[column]), column)


READERS: dict[str, Callable[[FileSource], Iterator[Numbered]]] = {
    ".txt": _read_lines,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
TABLES = (".jsonl", ".csv", ".parquet")
_REMEDIES = {
    ".txt": "write one prompt per line, as UTF-8",
    ".json": 'write a list, as ["a cat", "a dog"], or an object {"name": "a cat"}; a list of objects goes into .jsonl',
    ".jsonl": 'write one object per line, as {"caption": "a cat"}, as UTF-8',
    ".csv": "write a first line with the columns' names, texts with commas in double quotes, as UTF-8",
    ".parquet": "write the table again, with a column of texts",
}
