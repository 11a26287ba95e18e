# pyright: reportAttributeAccessIssue=false
"""The content of a backend as a sorted table on disk: files with versions of their captions, or samples with texts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ...plugin_api.backend import DataBackend, SampleBackend, SampleChunk
from ..hashing import digest
from ..samples.captions import CaptionRules
from ..samples.file_checks import checked_images, named
from ..samples.images import SUFFIXES
from ..tables.external_sort import (
    CHUNK,
    RUN_ROWS,
    OnDiskTable,
    between,
    in_chunks,
    joined,
    merge_table,
    open_run,
    sorted_table,
    write_run,
)
from ..tables.metadata_table import MetadataTable
from .build_folder import BuildFolder
from .index import SAME_NAME

FILES = pa.schema(
    [("key", pa.large_string()), ("size", pa.int64()), ("version", pa.large_string()), ("problem", pa.large_string())]
)
"""Files of a backend, as they are listed."""
LISTING = pa.schema(
    [
        *FILES,
        ("caption_version", pa.large_string()),
        ("position", pa.large_string()),
        ("texts", pa.large_list(pa.large_string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""Samples before their files are read: no texts where captions stand in files, sizes are 0 where unknown."""
IMAGES = rf"(?i:\.({'|'.join(SUFFIXES)})|/)$"
"""Keys of image files, and of folders that cannot be listed."""
BY = ("key", "position")
"""Columns that samples are sorted by."""
KEPT_SECONDS = 60.0
"""The samples that a resumable source has listed are saved at least so often."""


class FileListing:
    """The images of a backend of files, and the folders that cannot be listed."""

    def __init__(self, backend: DataBackend, rules: CaptionRules, folder: Path) -> None:
        self.backend, self.rules, self.folder, self.num_unmatched = backend, rules, folder, 0

    def table(self) -> pa.Table:
        """Return all images in key order, of schema :data:`LISTING`, mapped from files in the folder."""
        texts = OnDiskTable(FILES, self.folder)
        files = sorted_table(self._files(), ["key"], FILES, self.folder)
        is_text = (_of_kind(batch, r"\.txt$") for batch in files.to_batches(max_chunksize=CHUNK))
        captions = texts.extend(is_text if self.rules.reads_files else ()).table()
        images = (checked_images(_of_kind(batch, IMAGES)) for batch in files.to_batches(max_chunksize=CHUNK))
        listed, settings = (_with_captions(each, captions) for each in images), self.rules.settings
        beside = MetadataTable(settings, self.backend) if settings.metadata_file is not None else None
        table = OnDiskTable(LISTING, self.folder).extend(map(beside.joined, listed) if beside else listed).table()
        self.num_unmatched = beside.num_unmatched if beside else 0
        return table

    def _files(self) -> Iterator[pa.RecordBatch]:
        """Yield images and caption files, in columns."""
        for chunk in in_chunks(map(named, self.backend.list()), CHUNK):
            columns = {name: [getattr(entry, name) for entry in chunk] for name in FILES.names}
            batch = pa.RecordBatch.from_pydict(columns, schema=FILES)
            yield _of_kind(batch, rf"{IMAGES}|\.txt$")


def _of_kind(batch: pa.RecordBatch, pattern: str) -> pa.RecordBatch:
    return batch.filter(pc.match_substring_regex(batch["key"], pattern))


def _with_captions(images: pa.RecordBatch, texts: pa.Table) -> pa.RecordBatch:
    """Turn image files into a listing with the version of each one's caption file, empty where there is none."""
    count = len(images)
    empty, zeros = pa.repeat(pa.scalar("", pa.large_string()), count), pa.repeat(pa.scalar(0, pa.int32()), count)
    versions, unread = _beside(images["key"], texts)
    columns = {
        **{name: images[name] for name in FILES.names}, "caption_version": versions, "position": empty,
        "texts": pa.array([[]] * count, LISTING.field("texts").type), "width": zeros, "height": zeros,
        "problem": pc.if_else(pc.equal(images["problem"], ""), unread, images["problem"]),
    }  # fmt: skip
    return pa.RecordBatch.from_arrays([columns[name] for name in LISTING.names], schema=LISTING)


def _beside(keys: pa.Array, texts: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Return the version of the caption file beside each image, and why it cannot be read; both empty where there is
    none.
    """
    if not len(keys):
        return pa.array([], pa.large_string()), pa.array([], pa.large_string())
    names = pc.replace_substring_regex(keys, r"\.[^./]*$", ".txt")
    ends = pc.min_max(names).as_py()
    near = between(texts, "key", ends["min"], ends["max"]).combine_chunks()
    found = pc.index_in(names, value_set=joined(near["key"]))
    problems = pc.replace_substring_regex(joined(near["problem"]).take(found), r"\A(.+)", r"its caption file: \1")
    return pc.fill_null(joined(near["version"]).take(found), ""), pc.fill_null(problems, "")


# -- samples ----------------------------------------------------------------------------------------------------------


class SampleListing:
    """The samples of a backend that holds samples rather than files.

    The samples that a resumable source has listed are kept in the build folder, so that a build that dies is continued.
    """

    def __init__(self, backend: SampleBackend, identity: str, build_folder: BuildFolder) -> None:
        self.backend, self.build_folder = backend, build_folder
        self._name = f"samples-{blake2b(identity.encode(), digest_size=8).hexdigest()}"
        self._kept: list[pa.Table] = []

    def table(self) -> pa.Table:
        """Return all samples in key order, of schema :data:`LISTING`; repeated names get a problem."""
        folder = self.build_folder.folder
        listed = merge_table(self._runs(), BY, LISTING, folder)
        return OnDiskTable(LISTING, folder).extend(_with_repeats(listed)).table()

    def _runs(self) -> list[pa.Table]:
        self._kept = self._earlier()
        after = _metadata(self._kept, "after")
        if _metadata(self._kept, "whole"):
            return self._kept
        waiting, since = [], time.monotonic()
        try:
            for chunk in self.backend.samples_after(after) if after else self.backend.samples():
                waiting.append(_listed(chunk))
                after, old = chunk.resume, time.monotonic() - since > KEPT_SECONDS
                if sum(map(len, waiting)) >= RUN_ROWS or (after and old):
                    self._keep(waiting, after=after)
                    waiting, since = [], time.monotonic()
        except BaseException:
            if waiting and after:  # what was listed is not listed again
                self._keep(waiting, after=after)
            raise
        self._keep(waiting, whole="yes")
        return self._kept

    def _keep(self, batches: Sequence[pa.RecordBatch], **metadata: str) -> None:
        path = self.build_folder.folder / self._name / f"{len(self._kept):06d}.run"
        self._kept.append(write_run(batches, BY, LISTING, path, **metadata))

    def _earlier(self) -> list[pa.Table]:
        """Return the longest resumable listing that another build has left, copied into this build's folder."""
        found: dict[Path, list[Path]] = {}
        for path in self.build_folder.left(f"{self._name}/*.run"):
            found.setdefault(path.parent, []).append(path)
        for runs in sorted(found.values(), key=len, reverse=True):
            with suppress(FileNotFoundError):  # its build has just ended
                tables = [open_run(path) for path in runs]
                if _metadata(tables, "after") or _metadata(tables, "whole"):
                    self._copy(runs)
                    return tables
        return []

    def _copy(self, runs: Sequence[Path]) -> None:
        own = self.build_folder.folder / self._name
        own.mkdir()
        for path in runs:
            shutil.copyfile(path, own / path.name)


def _metadata(runs: Sequence[pa.Table], name: str) -> str:
    metadata = (runs[-1].schema.metadata or {}) if runs else {}
    return metadata.get(name.encode(), b"").decode()


def _listed(chunk: SampleChunk) -> pa.RecordBatch:
    texts = [digest("\x1f".join(each)).hex() for each in chunk.captions]
    columns = {
        "key": chunk.keys, "size": chunk.sizes, "version": chunk.versions, "caption_version": texts,
        "position": chunk.positions, "texts": chunk.captions, "width": chunk.widths, "height": chunk.heights,
        "problem": chunk.problems,
    }  # fmt: skip
    return pa.RecordBatch.from_pydict(columns, schema=LISTING)


def _with_repeats(listed: pa.Table) -> Iterator[pa.RecordBatch]:
    """Yield the samples, with a problem for those whose name has come before."""
    last = pa.scalar(None, pa.large_string())
    for batch in listed.to_batches(max_chunksize=CHUNK):
        keys = batch["key"]
        before = pa.concat_arrays([pa.array([last.as_py()], pa.large_string()), keys[:-1]])
        again = pc.fill_null(pc.equal(keys, before), False)
        problems = pc.if_else(again, SAME_NAME, batch["problem"])
        yield batch.set_column(batch.schema.get_field_index("problem"), LISTING.field("problem"), problems)
        last = keys[-1]
