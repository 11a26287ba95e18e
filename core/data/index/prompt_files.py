"""Prompts without images, read in columns from one file or from a folder of .txt files.

A :class:`PromptSource` is all that the rest of the data path knows of where prompts come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

from ...errors import BadValue
from ...plugin_api.backend import DataBackend, Entry, SampleBackend
from ...utils.prompt_library import json_texts
from ...utils.threads import threads
from ..samples.captions import read_text
from ..samples.file_checks import named
from ..tables.columns import CaptionColumns, Row
from ..tables.external_sort import CHUNK, in_chunks
from ..tables.readers import TABLES, Table, TableFile, decoded_line

if TYPE_CHECKING:
    from ...settings.dataset_settings import DatasetSettings

FILES_AT_ONCE = 256


@dataclass(frozen=True)
class Chunk:
    """Some prompts, in columns of one length.

    Attributes:
        keys: Names that stay the same as long as the prompt keeps its position.
        texts: The texts as written; None where there is none.
        problems: Why a text could not be read; empty where it could.
    """

    keys: list[str]
    texts: list[str | None]
    problems: list[str]


class PromptSource(Protocol):
    """The source of one dataset's prompts."""

    def identity(self) -> str:
        """Return a text that changes whenever the prompts may have changed."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """Yield all prompts in order. Raises BadValue."""
        ...


def open_source(backend: DataBackend, settings: DatasetSettings, *, workers: int = 1) -> PromptSource:
    """Open the prompts of a dataset: of its samples, its one file, or the .txt files of its folder."""
    if isinstance(backend, SampleBackend):
        return SampleCaptions(backend)
    if backend.prompts_key is not None:
        return FileSource(backend, backend.prompts_key, (settings.caption_column, settings.fallback_caption_column))
    return FolderSource(backend, whole_files=settings.disable_multiline_split, workers=workers)


def _version(entries: Sequence[Entry], *more: object) -> str:
    hasher = blake2b(json.dumps(more).encode(), digest_size=16)
    for entry in entries:
        hasher.update(json.dumps([entry.key, entry.size, entry.version]).encode())
    return hasher.hexdigest()


# -- samples ----------------------------------------------------------------------------------------------------------


class SampleCaptions:
    """The captions of a backend of samples, with a prompt for each text."""

    def __init__(self, backend: SampleBackend) -> None:
        self.backend = backend

    def identity(self) -> str:
        """Return the backend's own identity of its samples."""
        return self.backend.identity()

    def chunks(self) -> Iterator[Chunk]:
        """Yield all prompts; keys are the samples' names, with a number where a sample has several texts."""
        for samples in self.backend.samples(images=False):
            rows = [
                row
                for each in zip(samples.keys, samples.captions, samples.problems, strict=True)
                for row in _texts(*each)
            ]
            yield _chunk(rows)


def _chunk(rows: Sequence[tuple[str, str | None, str]]) -> Chunk:
    return Chunk([key for key, _, _ in rows], [text for _, text, _ in rows], [why for _, _, why in rows])


def _texts(key: str, texts: Sequence[str], problem: str) -> list[tuple[str, str | None, str]]:
    if len(texts) < 2 or problem:
        return [(key, texts[0] if texts else None, problem)]
    return [(f"{key}#{number}", text, "") for number, text in enumerate(texts)]


# -- a folder ---------------------------------------------------------------------------------------------------------


class FolderSource:
    """All .txt files of a backend, recursively, with a prompt per line or per file. Files that are not UTF-8 are
    quarantined.

    Args:
        backend: Holds the files.
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
        """Return a hash of the names, sizes and versions of the files."""
        return _version(self._files(), self.whole_files)

    def chunks(self) -> Iterator[Chunk]:
        """Yield all prompts; keys are ``a/b.txt:3``, or ``a/b.txt`` where whole files are prompts."""
        files = self._files()
        if not files:
            folder, file = self.backend.place_keys
            remedy = f"give the folder with the .txt files, or one file as {file}"
            raise BadValue(folder, self.backend.location, "holds no .txt file", remedy)
        with threads(self.workers) as pool:
            for part in in_chunks(iter(files), FILES_AT_ONCE):
                rows = [row for rows in pool.map(self._read, part) for row in rows]
                yield _chunk(rows)

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

Numbered = tuple[Sequence[int], Sequence[list[str]]]
"""Line or row numbers, counted from 1, and the texts there."""


class FileSource:
    """The prompts of one file of a backend.

    Args:
        backend: Holds the file.
        key: Its key.
        columns: The columns of a table that hold prompts, and those that do where these are empty; none for the usual.
    """

    def __init__(self, backend: DataBackend, key: str, columns: tuple[Sequence[str], Sequence[str]] = ((), ())) -> None:
        self.backend, self.key, self.columns = backend, key, columns
        self.suffix = PurePosixPath(key).suffix.lower()
        self.file = TableFile(backend.place_keys[1], backend.location, lambda: backend.open(key))

    def identity(self) -> str:
        """Return a hash of the name, size and version of the file."""
        with self.file.reading(""):
            return _version([self.backend.entry(self.key)], self.columns)

    def chunks(self) -> Iterator[Chunk]:
        """Yield all prompts; keys are line or row numbers, counted from 1."""
        if self.suffix not in (*READERS, *TABLES):
            problem = f"has the suffix {self.suffix!r}; {', '.join((*READERS, *TABLES))} are read"
            raise self.file.bad(problem, "write one prompt per line into a .txt file")
        table = TABLES[self.suffix](self.file) if self.suffix in TABLES else None
        if table is None:
            self._check_no_columns()
        remedy = table.remedy if table else _REMEDIES[self.suffix]
        found = False
        with self.file.reading(remedy):
            for numbers, texts in self._read_table(table) if table else READERS[self.suffix](self.file):
                found = found or bool(numbers)
                rows = [
                    row for number, each in zip(numbers, texts, strict=True) for row in _texts(str(number), each, "")
                ]
                yield _chunk(rows)
        if not found:
            raise self.file.bad("is empty: there is no prompt in it", remedy)

    def _check_no_columns(self) -> None:
        for key, names in zip(("caption_column", "fallback_caption_column"), self.columns, strict=True):
            if names:
                problem = f"{self.key} is no table: columns are in {', '.join(TABLES)}"
                raise BadValue(key, list(names), problem, f"leave {key} out")

    def _read_table(self, table: Table) -> Iterator[Numbered]:
        there = table.columns()
        if not there.names:
            return
        captions = CaptionColumns.of(there, *self.columns)
        for part in table.rows(captions.names):
            yield part.numbers, [_captions(table, captions, *row) for row in zip(part.numbers, part.rows, strict=True)]


def _captions(table: Table, captions: CaptionColumns, number: int, row: Row) -> list[str]:
    try:
        return captions.texts(row)
    except ValueError as error:
        raise ValueError(f"{table.noun} {number}: {error}") from error


def _read_lines(file: TableFile) -> Iterator[Numbered]:
    with file.open() as stream:
        for chunk in in_chunks(enumerate(stream, 1), CHUNK):
            kept = [(number, text) for number, line in chunk if (text := decoded_line(line, number).strip())]
            yield [number for number, _ in kept], [[text] for _, text in kept]


def _read_json(file: TableFile) -> Iterator[Numbered]:
    with file.open() as stream:
        texts = [[text] for text in json_texts(stream.read().decode("utf-8-sig"))]
    yield range(1, len(texts) + 1), texts


READERS: dict[str, Callable[[TableFile], Iterator[Numbered]]] = {".txt": _read_lines, ".json": _read_json}
"""Readers of files that are not tables, by suffix."""
_REMEDIES = {
    ".txt": "write one prompt per line, as UTF-8",
    ".json": 'write a list, as ["a cat", "a dog"], or an object {"name": "a cat"}; a list of objects goes into .jsonl',
}
