"""Tables with an image in each row: comma separated values, JSON lines, Parquet."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, BinaryIO

from pydantic import BeforeValidator, Field

from ..core.data.tables.readers import CsvTable, JsonLinesTable, ParquetTable
from ..core.plugin_api.backend import DataBackend, SampleChunk, SequentialChunk
from ..core.plugin_api.hookspecs import hookimpl
from ..core.settings.types import PathOrUrl, one_or_many
from ._row_groups import KEPT_BYTES, RowGroups
from ._rows import Layout
from ._table_backend import TableBackend, TableSettings

Locations = Annotated[tuple[PathOrUrl, ...], Field(min_length=1), BeforeValidator(one_or_many)]


def _aliases(kind: str) -> Mapping[str, str]:
    """Return the established trainer's names of keys, as ``csv_url_column``, with ours."""
    return {f"{kind}_url_column": "image_column", f"{kind}_caption_column": "caption_column"}


class CsvBackend(TableBackend):
    """Rows of .csv (or .tsv) tables, with the path or URL of an image in each."""

    name = "csv"
    table, suffixes, file_key = CsvTable, (".csv", ".tsv"), "csv_file"
    key_aliases = _aliases("csv")

    class Config(TableSettings):
        """The tables, and the meaning of their columns."""

        csv_file: Locations
        """One or several: a file, a folder of them, a glob or a brace range `{000..012}`, here or as a URL."""

    @property
    def given(self) -> Sequence[str]:
        """The paths and URLs of ``csv_file``."""
        return self.config.csv_file


class JsonLinesBackend(TableBackend):
    """Rows of .jsonl tables, an object on each line, with the path or URL of an image in each."""

    name = "jsonl"
    table, suffixes, file_key = JsonLinesTable, (".jsonl", ".ndjson"), "jsonl_file"
    key_aliases = _aliases("jsonl")

    class Config(TableSettings):
        """The tables, and the meaning of their columns."""

        jsonl_file: Locations
        """One or several: a file, a folder of them, a glob or a brace range `{000..012}`, here or as a URL."""

    @property
    def given(self) -> Sequence[str]:
        """The paths and URLs of ``jsonl_file``."""
        return self.config.jsonl_file


class ParquetBackend(TableBackend):
    """Rows of .parquet tables, with an image, or the path or URL of one, in each."""

    name = "parquet"
    table, suffixes, file_key = ParquetTable, (".parquet",), "parquet_file"
    key_aliases = _aliases("parquet")

    class Config(TableSettings):
        """The tables, and the meaning of their columns."""

        parquet_file: Locations
        """One or several: a file, a folder of them, a glob or a brace range `{000..012}`, here or as a URL."""

    @property
    def given(self) -> Sequence[str]:
        """The paths and URLs of ``parquet_file``."""
        return self.config.parquet_file

    @cached_property
    def _groups(self) -> RowGroups | None:
        """The row groups, if images are inside the tables; None where they are files."""
        table = self._table(self.files[0])
        column = Layout.of(table.columns(), self.config, images=True).image
        assert column is not None
        return RowGroups(self.file_key, self.files, column) if table.holds_bytes(column) else None

    @property
    def in_order(self) -> bool:
        """True if the tables hold more bytes of images than fit into memory."""
        return self._groups is not None and self._groups.num_bytes > KEPT_BYTES

    def samples(self, *, images: bool = True) -> Iterator[SampleChunk]:
        """Yield every row of every table. Raises BadValue where row groups are too large to be read again."""
        if images:
            _ = self._groups
        yield from super().samples(images=images)

    def sequential(self, resume: str = "") -> Generator[SequentialChunk, None, None]:
        """Yield all images inside the tables, a row group at a time."""
        assert self._groups is not None
        yield from self._groups.sequential(resume)

    def open(self, key: str) -> BinaryIO:
        """Open an image inside a table by its row, or one that is a file."""
        if key.isdecimal():
            assert self._groups is not None
            return self._groups.open(int(key))
        return super().open(key)


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """Register the three kinds of tables."""
    return [CsvBackend, JsonLinesBackend, ParquetBackend]
