"""A folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, Self

from pydantic import model_validator

from ..core.backend import DataBackend, Entry
from ..core.config.types import LocalPath, Settings
from ..core.data.storage import write_whole
from ..core.errors import UserError
from ..core.hookspecs import hookimpl

NAMES_AT_ONCE = 8192


class LocalBackend(DataBackend):
    """All files below ``instance_data_dir``, recursively; names that begin with a dot are skipped.

    Or, for ``dataset_type: prompts``, the one file ``prompts_file``.
    """

    name = "local"

    class Config(Settings):
        """Where the folder or the file is."""

        instance_data_dir: LocalPath | None = None
        """The folder with the pictures (a relative path is relative to the file that names it)."""
        prompts_file: LocalPath | None = None
        """For `prompts`, instead of a folder of .txt files: one .txt, .json, .jsonl, .csv or .parquet file."""

        @model_validator(mode="after")
        def _one_place(self) -> Self:
            if self.instance_data_dir is None and self.prompts_file is None:
                raise ValueError("instance_data_dir is required (or, with dataset_type prompts, a prompts file)")
            if self.instance_data_dir is not None and self.prompts_file is not None:
                raise ValueError("instance_data_dir and prompts_file are both given, and only one of them can be read")
            return self

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.file = None if config.prompts_file is None else Path(config.prompts_file).expanduser()
        self.root = self.file.parent if self.file else Path(config.instance_data_dir).expanduser()

    @property
    def location(self) -> str:
        """The folder, or the one file."""
        return str(self.file or self.root)

    @property
    def prompts_key(self) -> str | None:
        """The name of ``prompts_file``."""
        return self.file.name if self.file else None

    def entry(self, key: str) -> Entry:
        """Size and modification time of one file."""
        status = (self.root / key).stat()
        return Entry(key, status.st_size, str(status.st_mtime_ns))

    def list(self) -> Iterator[Entry]:
        """Every file, in sorted key order. Links are followed; a link back to a folder above is not."""
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise UserError(
                f"instance_data_dir = {str(self.root)!r} {what}",
                "give the folder that holds the pictures (a relative path is relative to the file that names it)",
            )
        yield from self._walk(str(self.root), "", (os.path.realpath(self.root),))

    def _walk(self, folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[Entry]:
        for name in _sorted_names(folder):
            path = os.path.join(folder, name)
            if name.endswith("/"):
                real = os.path.realpath(path)
                if real not in above:
                    yield from self._walk(path[:-1], prefix + name, (*above, real))
                continue
            try:
                status = os.stat(path)
            except OSError:  # a link to nowhere, or gone since
                continue
            if S_ISREG(status.st_mode):
                yield Entry(prefix + name, status.st_size, str(status.st_mtime_ns))

    def open(self, key: str) -> BinaryIO:
        """The file's content."""
        return (self.root / key).open("rb")

    def exists(self, key: str) -> bool:
        """Whether the file is there."""
        return (self.root / key).is_file()

    def write(self, key: str, data: bytes) -> None:
        """Write the file whole or not at all."""
        write_whole(self.root / key, data)


def _sorted_names(folder: str) -> Iterator[str]:
    """Names in a folder, those of folders with a slash at the end: as one column, for there may be millions."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with os.scandir(folder) as scan:
        names = (os.fsencode(item.name + "/" * item.is_dir()) for item in scan if not item.name.startswith("."))
        chunks = iter(lambda: list(islice(names, NAMES_AT_ONCE)), [])
        column = pa.chunked_array([pa.array(chunk, pa.large_binary()) for chunk in chunks], pa.large_binary())
    order = pc.sort_indices(column)  # pyright: ignore[reportAttributeAccessIssue]
    joined = column.combine_chunks()
    for start in range(0, len(order), NAMES_AT_ONCE):
        yield from map(os.fsdecode, joined.take(order.slice(start, NAMES_AT_ONCE)).to_pylist())


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """The local folder."""
    return [LocalBackend]
