"""The common base of backends of tables: an image in each row, inside the table, in a file or behind a URL."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import BinaryIO, ClassVar

from ..core.data.tables.columns import Columns
from ..core.data.tables.locations import Location, at, identity_of, locate
from ..core.data.tables.readers import Rows, Table, TableFile
from ..core.plugin_api.backend import SampleBackend, SampleChunk
from ..core.settings.dataset_settings import ColumnSettings
from ..core.settings.types import PathOrUrl
from ..core.storage import is_remote
from ._rows import AT, Layout, Reader, chunk_of, resolved, root_of

THREADS = 8
"""Images that are looked at together."""


class TableSettings(ColumnSettings):
    """Keys of all tables."""

    instance_data_dir: PathOrUrl | None = None
    """Folder or URL that images' paths are relative to; absent: the folder of the table."""
    image_column: str | None = None
    """Column of images: paths, URLs, bytes, or structs of bytes and path. Absent: `image`, `file_name`, `filename`,
    `path`, `image_path`, `url`, else `image_url`."""


class TableBackend(SampleBackend):
    """Rows of tables of one kind. A row's name is the path of its image, unless a column of names is given."""

    table: ClassVar[type[Table]]
    suffixes: ClassVar[Sequence[str]]
    file_key: ClassVar[str]
    """The key that says where the tables are."""

    Config: ClassVar[type[TableSettings]]

    @property
    @abstractmethod
    def given(self) -> Sequence[str]:
        """The paths and URLs of the tables, as the entry gives them."""

    @property
    def location(self) -> str:
        """The paths and URLs of the tables, for messages."""
        return ", ".join(self.given)

    @cached_property
    def files(self) -> Sequence[Location]:
        """The tables. Raises BadValue where there is none."""
        return locate(self.file_key, self.given, self.suffixes)

    def identity(self) -> str:
        """Return a hash of the names, sizes and versions of the tables, and of the columns that are read."""
        return identity_of(self.files, self.config.model_dump(mode="json", exclude={self.file_key}))

    def check_samples(self, *, images: bool, captions: bool) -> None:
        """Check that the first table is there and has the columns that are needed, unless it is remote."""
        if not any(map(is_remote, self.given)):
            Layout.of(self._columns_of(self._table(self.files[0])), self.config, images=images, captions=captions)

    def samples(self, *, images: bool = True) -> Iterator[SampleChunk]:
        """Yield every row of every table; the bytes of images inside them are hashed and their headers read."""
        number = 0
        with ThreadPoolExecutor(THREADS) as pool:
            for table, file in enumerate(self.files):
                for part, reader in self._rows(table, file, images=images):
                    read = reader.sample if images else reader.prompt
                    numbers = range(number, number + len(part.rows))
                    yield chunk_of(list(pool.map(read, numbers, part.rows)))
                    number = numbers.stop

    def _rows(self, number: int, file: Location, *, images: bool) -> Iterator[tuple[Rows, Reader]]:
        table = self._table(file)
        there = self._columns_of(table)
        reader = Reader(Layout.of(there, self.config, images=images), root_of(self.config, file), number)
        inside = reader.layout.image is not None and table.holds_bytes(reader.layout.image)
        for part in table.rows(reader.columns(there, images=images, inside=inside)):
            yield part, reader

    @staticmethod
    def _columns_of(table: Table) -> Columns:
        columns = table.columns()
        if not columns.names:
            raise table.empty()
        return columns

    def _table(self, file: Location) -> Table:
        return self.table(TableFile(self.file_key, file.path, file.open))

    def open(self, key: str) -> BinaryIO:
        """Open an image that is a file."""
        table, _, path = key.removeprefix(AT).partition(":")
        return at(resolved(path, root_of(self.config, self.files[int(table)]))).open()
