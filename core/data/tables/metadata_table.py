# pyright: reportAttributeAccessIssue=false
"""A table beside the image files of a folder or a bucket, with captions and sizes in one row for each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...errors import BadValue
from ...plugin_api.backend import DataBackend
from ...storage import is_remote
from .columns import HEIGHTS, NAMES, WIDTHS, CaptionColumns, Columns, Row, edge_of, value_of
from .external_sort import joined
from .locations import at
from .readers import TABLES, Rows, Table, TableFile

if TYPE_CHECKING:
    from ...settings.dataset_settings import DatasetSettings

SCHEMA = pa.schema(
    [
        ("name", pa.large_string()),
        ("texts", pa.large_list(pa.large_string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("version", pa.large_string()),
    ]
)


class MetadataTable:
    """The table that a dataset names as ``metadata_file``.

    Args:
        settings: The dataset.
        backend: Holds its images, and perhaps the table.
    """

    def __init__(self, settings: DatasetSettings, backend: DataBackend) -> None:
        assert settings.metadata_file is not None
        self.settings, path = settings, settings.metadata_file
        suffix = PurePosixPath(path.partition("?")[0]).suffix.lower()
        if suffix not in TABLES:
            problem = f"has the suffix {suffix!r}; {', '.join(TABLES)} are read"
            raise BadValue("metadata_file", path, problem, "write the table in one of these formats")
        inside = not is_remote(path) and not Path(path).is_absolute()
        opener = (lambda: backend.open(path)) if inside else at(path).open
        self.table: Table = TABLES[suffix](TableFile("metadata_file", path, opener))

    def check(self) -> None:
        """Raise BadValue unless the table is there and has the columns."""
        self._layout()

    @property
    def num_unmatched(self) -> int:
        """The number of rows that belong to no image, once all images have been joined."""
        return int((~self._matched).sum())

    @cached_property
    def _rows(self) -> pa.Table:
        layout = self._layout()
        return pa.Table.from_batches(map(layout.batch, self.table.rows(layout.names)), SCHEMA).combine_chunks()

    @cached_property
    def _matched(self) -> NDArray[np.bool_]:
        return np.zeros(len(self._rows), np.bool_)

    def joined(self, listed: pa.RecordBatch) -> pa.RecordBatch:
        """Add the table's captions and sizes to some listed image files.

        Raises:
            BadValue: The table is not there, or lacks a column.
        """
        positions = self._positions(listed["key"], joined(self._rows["name"]))
        self._matched[pc.drop_null(positions).to_numpy(zero_copy_only=False)] = True
        found, settings = self._rows.take(positions), self.settings
        versions = pc.fill_null(joined(found["version"]), "")
        if settings.captions_in_table:
            listed = _with(listed, "texts", pc.fill_null(joined(found["texts"]), []))
            listed = _with(listed, "caption_version", versions)
        else:  # of captions in files: they are read again where the table says other sizes
            both = pc.binary_join_element_wise(listed["caption_version"], versions, "")
            empty = pc.equal(listed["caption_version"], "")
            listed = _with(listed, "caption_version", pc.if_else(empty, "", both))
        for name in ("width", "height") if settings.sizes_in_table else ():
            listed = _with(listed, name, pc.fill_null(joined(found[name]), 0))
        return listed

    @staticmethod
    def _positions(keys: pa.Array, names: pa.Array) -> pa.Array:
        """Find the row of each image by its whole name, else by its name without the suffix."""
        stems = pc.replace_substring_regex(keys, r"\.[^./]*$", "")
        return pc.coalesce(pc.index_in(keys, value_set=names), pc.index_in(stems, value_set=names))

    def _layout(self) -> _Layout:
        columns = self.table.columns()
        if not columns.names:
            raise self.table.empty()
        return _Layout(columns, self.settings)


def _with(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    field = batch.schema.field(name)
    return batch.set_column(batch.schema.get_field_index(name), field, column.cast(field.type))


class _Layout:
    """The columns that hold names, captions and sizes."""

    def __init__(self, columns: Columns, settings: DatasetSettings) -> None:
        self.name = columns.required("filename_column", _given(settings.filename_column), NAMES)[0]
        self.captions, self.edges = None, []
        if settings.captions_in_table:
            self.captions = CaptionColumns.of(columns, settings.caption_column, settings.fallback_caption_column)
        if settings.sizes_in_table:
            self.edges = [
                *columns.required("width_column", _given(settings.width_column), WIDTHS),
                *columns.required("height_column", _given(settings.height_column), HEIGHTS),
            ]

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        return [self.name, *(self.captions.names if self.captions else ()), *self.edges]

    def batch(self, part: Rows) -> pa.RecordBatch:
        """Turn some rows into a batch of schema :data:`SCHEMA`."""
        rows = [self._row(number, row) for number, row in zip(part.numbers, part.rows, strict=True)]
        return pa.RecordBatch.from_pylist(rows, SCHEMA)

    def _row(self, number: int, row: Row) -> dict[str, Any]:
        try:
            texts = self.captions.texts(row) if self.captions else []
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        width, height = ([edge_of(value_of(row, name)) for name in self.edges]) or (0, 0)
        version = blake2b(json.dumps([texts, width, height]).encode(), digest_size=8).hexdigest()
        name = str(value_of(row, self.name) or "").removeprefix("./")
        return {"name": name, "texts": texts, "width": width, "height": height, "version": version}


def _given(name: str | None) -> Sequence[str]:
    return [] if name is None else [name]
