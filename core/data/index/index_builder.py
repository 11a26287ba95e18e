# pyright: reportAttributeAccessIssue=false
"""Building an index: list the samples, read those that are not known, assemble all; in bounded memory, nothing read
twice.

Rows are saved on disk as they are read. A build that dies, or whose source goes out of reach, leaves them in its build
folder, and the next build goes on with them; the index is the one of an uninterrupted build, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import BadValue, UserError
from ...plugin_api.backend import DataBackend, SampleBackend
from ...utils.progress import TaskProgress
from ...utils.threads import threads
from ..hashing import digest
from ..samples.captions import CaptionRules, caption_key, read_caption
from ..samples.images import SUFFIXES, BrokenImage, probe, why_unread
from ..tables.external_sort import CHUNK, OnDiskTable, between, joined, merge_table, open_run, write_run
from .build_folder import BuildFolder
from .index import NO_CAPTION, SCHEMA, Index, open_index, write_index
from .listing import LISTING, FileListing, SampleListing

READ_ROWS = 2048
"""Rows that are read before they are saved."""
IMAGE = ("key", "size", "version")
"""Columns that identify an image's content."""
ROW = (*IMAGE, "caption_version", "position")
"""Columns that identify everything that a row is made of."""
SEPARATOR = pa.scalar("\x1f", pa.large_string())
ROWS = ".rows"


@dataclass(frozen=True)
class Read:
    """The result of reading one file; a width of -1 says that it was out of reach."""

    width: int = 0
    height: int = 0
    captions: list[str] = field(default_factory=list)
    problem: str = ""


class Known:
    """Rows that were read earlier, found by the columns that they are made of.

    Args:
        by: Columns that must be the same.
    """

    def __init__(self, *by: str) -> None:
        self._by = by
        self._tables: list[tuple[pa.Table, Callable[[pa.Table], pa.Table]]] = []

    def add(self, table: pa.Table, only: Callable[[pa.Table], pa.Table]) -> None:
        """Add a table sorted by key; of its rows only those count that `only` keeps."""
        self._tables.append((table.select(SCHEMA.names), only))

    def find(self, listed: pa.RecordBatch) -> tuple[pa.Table, pa.Array]:
        """Return some known rows, and for each listed row its position among them, null where it is not known."""
        ends = pc.min_max(listed["key"]).as_py()
        near = [only(between(table, "key", ends["min"], ends["max"])) for table, only in self._tables]
        table = pa.concat_tables([SCHEMA.empty_table(), *near]).combine_chunks()
        return table, pc.index_in(_stamp(listed, self._by), value_set=joined(_stamp(table, self._by)))


def _reusable(rows: pa.Table) -> pa.Table:
    """Keep the rows that hold as long as their files do; the others are tried again, for they may have been out of
    reach.
    """
    return rows.filter(pc.is_in(rows["problem"], value_set=pa.array(["", NO_CAPTION], pa.large_string())))


def _measured(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.greater(rows["width"], 0))


def _all(rows: pa.Table) -> pa.Table:
    return rows


def _stamp(rows: pa.RecordBatch | pa.Table, by: Sequence[str]) -> Any:
    return pc.binary_join_element_wise(*(rows[name].cast(pa.large_string()) for name in by), SEPARATOR)


class ReadRows:
    """The rows that have been read, kept in the build folder in sorted files of a few thousand.

    Args:
        build_folder: Of this build; other builds have left theirs beside it.
        rules: Identity of the caption rules; rows made by other rules serve for their sizes only.
    """

    def __init__(self, build_folder: BuildFolder, rules: str) -> None:
        self.build_folder, self.rules, self._own = build_folder, rules, list[pa.Table]()
        self._earlier = list(_opened(build_folder.left(f"*{ROWS}")))

    def keep(self, batch: pa.RecordBatch) -> None:
        """Write some rows to disk, all or none."""
        path = self.build_folder.folder / f"{len(self._own):06d}{ROWS}"
        self._own.append(write_run([batch], ["key"], SCHEMA, path, rules=self.rules))

    def earlier(self, *, same_rules: bool) -> pa.Table:
        """Return the rows of earlier builds, made by the same rules or by others."""
        return self._table([run for run in self._earlier if self._fits(run) == same_rules])

    def _fits(self, run: pa.Table) -> bool:
        return (run.schema.metadata or {}).get(b"rules") == self.rules.encode()

    def own(self) -> pa.Table:
        """Return the rows of this build."""
        return self._table(self._own)

    def _table(self, runs: Sequence[pa.Table]) -> pa.Table:
        return merge_table(runs, ["key"], SCHEMA, self.build_folder.folder)


def _opened(paths: Iterable[Path]) -> Iterator[pa.Table]:
    for path in paths:
        with suppress(FileNotFoundError):  # the build that had left it has just ended
            yield open_run(path)


def source_of(backend: SampleBackend) -> str:
    """Return a text that identifies what an index is made of: the samples, and the software that read their images."""
    return json.dumps([backend.identity(), PIL.__version__, SUFFIXES])


class IndexBuilder:
    """The builder that brings a dataset's index up to date.

    Args:
        dataset: Id of the dataset.
        backend: Its source.
        rules: How captions are made.
        workers: Threads that read files.
        progress: Reports every file that is read.
        again: Whether files that could not be used are tried again although they have not changed.
    """

    def __init__(
        self,
        dataset: str,
        backend: DataBackend,
        rules: CaptionRules,
        *,
        workers: int,
        progress: TaskProgress,
        again: bool = True,
    ) -> None:
        self.dataset, self.backend, self.rules, self._again = dataset, backend, rules, again
        self.workers, self.progress = max(1, workers, backend.parallel_reads), progress
        self.num_read = self.num_unmatched = 0

    def build(self, path: Path) -> Index:
        """Write the index to `path`, reading only files that are new or have changed.

        Raises:
            UserError: The samples cannot be read.
            distill.core.errors.OutOfReach: The source does not answer; rows already read are kept for the next build.
        """
        try:
            if isinstance(self.backend, SampleBackend):
                return self._build_samples(self.backend, path)
            with BuildFolder(path) as build_folder:
                files = FileListing(self.backend, self.rules, build_folder.folder)
                listing = files.table()
                self.num_unmatched = files.num_unmatched
                return self._build(listing, path, "", build_folder)
        except BadValue as error:
            raise UserError(f"data.{self.dataset}.{error}", error.remedy) from error

    def _build_samples(self, backend: SampleBackend, path: Path) -> Index:
        source = source_of(backend)
        old = open_index(path)
        if old is not None and old.matches(self.rules.identity(), source) and not (self._again and old.has_unread()):
            return old
        with BuildFolder(path) as build_folder:
            return self._build(SampleListing(backend, source, build_folder).table(), path, source, build_folder)

    def _build(self, listing: pa.Table, path: Path, source: str, build_folder: BuildFolder) -> Index:
        """Read the listed samples that are not known, then assemble all rows in the order of the listing."""
        rules, old = self.rules.identity(), open_index(path)
        read_rows, rows, sizes = ReadRows(build_folder, rules), Known(*ROW), Known(*IMAGE)
        if old is not None:
            sizes.add(old.table, _measured)
            if old.matches(rules):
                rows.add(old.table, _reusable if self._again else _all)
        earlier = read_rows.earlier(same_rules=True)
        rows.add(earlier, _reusable)
        sizes.add(earlier, _measured)
        sizes.add(read_rows.earlier(same_rules=False), _measured)
        unknown = OnDiskTable(LISTING, build_folder.folder).extend(self._unknown(listing, rows)).table()
        self.num_read = len(unknown)
        if old is not None and old.matches(rules, source) and not len(unknown) and len(old) == len(listing):
            return old
        self._read(unknown, sizes, read_rows)
        rows.add(read_rows.own(), _all)
        return write_index(self._assembled(listing, rows), path, rules, source, folder=build_folder.folder)

    @staticmethod
    def _unknown(listing: pa.Table, rows: Known) -> Iterator[pa.RecordBatch]:
        for batch in listing.to_batches(max_chunksize=CHUNK):
            usable = batch.filter(pc.equal(batch["problem"], ""))
            if len(usable):
                yield usable.filter(rows.find(usable)[1].is_null())

    def _read(self, unknown: pa.Table, sizes: Known, read_rows: ReadRows) -> None:
        if not len(unknown):
            return
        with (
            self.progress(f"reading the files of {self.dataset!r}", len(unknown)) as advance,
            threads(self.workers) as pool,
        ):
            for batch in unknown.to_batches(max_chunksize=READ_ROWS):
                rows, read = _with_known_sizes(batch, sizes).to_pylist(), []
                try:
                    for result in pool.map(self._read_one, rows):
                        read.append(result)
                        advance(1)
                finally:  # whatever ends it: what was read is not read again
                    if read:
                        read_rows.keep(self._to_batch(rows[: len(read)], read))

    def _read_one(self, row: dict[str, Any]) -> Read:
        try:
            width, height = row["width"], row["height"]
            if not width or not height:
                with self.backend.open(row["position"] or row["key"]) as stream:
                    width, height = probe(stream)
            captions = self._captions(row)
        except (BrokenImage, ValueError) as error:
            return Read(problem=str(error))
        except OSError as error:
            return Read(width=-1, problem=why_unread(error, row["key"]))
        return Read(width, height, captions, "" if captions else NO_CAPTION)

    def _captions(self, row: dict[str, Any]) -> list[str]:
        key = row["key"]
        if isinstance(self.backend, SampleBackend) or self.rules.settings.captions_in_table:
            return self.rules.of_sample(key, row["texts"])
        return self.rules.captions(key, self._caption_text(key) if row["caption_version"] else None)

    def _caption_text(self, key: str) -> str:
        with self.backend.open(caption_key(key)) as stream:
            return read_caption(stream)

    def _assembled(self, listing: pa.Table, rows: Known) -> Iterator[pa.RecordBatch]:
        for batch in listing.to_batches(max_chunksize=CHUNK):
            usable = batch.filter(pc.equal(batch["problem"], ""))
            found, positions = rows.find(usable) if len(usable) else (SCHEMA.empty_table(), pa.array([], pa.int32()))
            table = found.take(positions).cast(SCHEMA)
            if len(usable) < len(batch):  # what the listing itself calls unusable was never read
                bad = batch.filter(pc.not_equal(batch["problem"], "")).to_pylist()
                unusable = self._to_batch(bad, [Read(problem=row["problem"]) for row in bad])
                table = pa.concat_tables([table, pa.Table.from_batches([unusable])])
                table = table.sort_by([("key", "ascending"), ("position", "ascending")])
            yield from table.combine_chunks().to_batches()

    def _to_batch(self, rows: Sequence[dict[str, Any]], read: Sequence[Read]) -> pa.RecordBatch:
        names = [f"{self.dataset}\x1f{row['key']}" for row in rows]
        draws = [int.from_bytes(digest(name)[:8], "little") for name in names]
        identities = [
            digest(f"{name}\x1f{row['size']}\x1f{row['version']}") for name, row in zip(names, rows, strict=True)
        ]
        columns = {
            **{name: [row[name] for row in rows] for name in ("key", "size", "version", "caption_version", "position")},
            "width": [each.width for each in read],
            "height": [each.height for each in read],
            "draw": draws,
            "identity": identities,
            "captions": [each.captions for each in read],
            "digests": [[digest(caption) for caption in each.captions] for each in read],
            "problem": [each.problem for each in read],
        }
        return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _with_known_sizes(listed: pa.RecordBatch, sizes: Known) -> pa.RecordBatch:
    """Fill in the widths and heights of listed images that have been measured before."""
    found, positions = sizes.find(listed)
    for name in ("width", "height"):
        known = pc.fill_null(joined(found[name]).take(positions), 0)
        given = pc.if_else(pc.equal(listed[name], 0), known, listed[name])
        listed = listed.set_column(listed.schema.get_field_index(name), LISTING.field(name), given)
    return listed
