"""A folder on this machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Self

from pydantic import model_validator

from ..core.errors import BadValue, UserError
from ..core.plugin_api.backend import DataBackend, Entry
from ..core.plugin_api.hookspecs import hookimpl
from ..core.settings.types import LocalPath, PathOrUrl, Settings, is_url
from ..core.utils.files import write_whole

NAMES_AT_ONCE = 8192
KINDS = (
    (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)  # fmt: skip
"""Kinds of objects that may have an image's name, are no files, and would be waited for without end."""


class LocalBackend(DataBackend):
    """All files below ``instance_data_dir``, recursively; names that begin with a dot are skipped.

    Or, for ``dataset_type: prompts``, the one file ``prompts_file``.
    """

    name = "local"
    on_this_machine = True

    class Config(Settings):
        """The folder or the file."""

        instance_data_dir: PathOrUrl | None = None
        """The folder with the images (a relative path is relative to the file that names it)."""
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

    @classmethod
    def example(cls, folder: Path, files: Mapping[str, bytes]) -> Mapping[str, Any]:
        """Write the files into the folder."""
        for key, data in files.items():
            write_whole(folder / key, data)
        return {"instance_data_dir": folder}

    def check(self) -> None:
        """Check that the folder exists."""
        if self.file is None and not self.root.is_dir():
            place = str(self.config.instance_data_dir)
            if is_url(place):
                remedy = "set type to the kind of place that it is (s3), or keep a table of URLs (type csv)"
                raise BadValue("instance_data_dir", place, "is a URL, and type local reads folders", remedy)
            problem = "is a file, not a folder" if self.root.exists() else "does not exist"
            remedy = "give the folder of the images (of prompts, .txt files): --set data.<id>.instance_data_dir=DIR"
            raise BadValue("instance_data_dir", place, problem, remedy)

    @property
    def location(self) -> str:
        """The folder, or the one file."""
        return str(self.file or self.root)

    @property
    def prompts_key(self) -> str | None:
        """The name of ``prompts_file``."""
        return self.file.name if self.file else None

    def entry(self, key: str) -> Entry:
        """Return size and modification time of one file."""
        status = (self.root / key).stat()
        return Entry(key, status.st_size, str(status.st_mtime_ns))

    def list(self) -> Iterator[Entry]:
        """Yield every file, in sorted key order. Links are followed, except back to a folder above.

        What has a name but is no file, or a folder that cannot be listed, comes with its problem.
        """
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise UserError(
                f"instance_data_dir = {str(self.root)!r} {what}",
                "give the folder that holds the images (a relative path is relative to the file that names it)",
            )
        try:
            above, levels = [_identity(self.root)], [("", _sorted_names(self.root))]
        except PermissionError as error:
            raise UserError(f"{self.root} cannot be listed: {error.strerror}", "let this user read it") from error
        while levels:  # not recursive: folders may lie deeper than calls may
            prefix, names = levels[-1]
            name = next(names, "")
            key, path = prefix + name, f"{self.root}/{prefix}{name}"
            if not name:
                levels.pop()
                above.pop()
            elif not name.endswith("/"):
                yield _entry(key, path)
            else:
                try:
                    folder = _identity(path)
                    inside = iter(()) if folder in above else _sorted_names(path)
                except OSError as error:
                    yield Entry(key, 0, "", problem=f"the folder cannot be listed: {error.strerror}")
                    continue
                levels.append((key, inside))
                above.append(folder)

    def open(self, key: str) -> BinaryIO:
        """Open the file."""
        return (self.root / key).open("rb")

    def exists(self, key: str) -> bool:
        """Return whether the file exists."""
        return (self.root / key).is_file()

    def write(self, key: str, data: bytes) -> None:
        """Write the file whole or not at all."""
        write_whole(self.root / key, data)

    def delete(self, key: str) -> None:
        """Remove the file."""
        (self.root / key).unlink(missing_ok=True)


def _sorted_names(folder: Path | str) -> Iterator[str]:
    """Yield the names in a folder, those of folders with a slash at the end; sorted as one column, for there may be
    millions.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    with os.scandir(folder) as scan:
        names = (os.fsencode(item.name + "/" * _is_folder(item)) for item in scan if not item.name.startswith("."))
        chunks = iter(lambda: list(islice(names, NAMES_AT_ONCE)), [])
        column = pa.chunked_array([pa.array(chunk, pa.large_binary()) for chunk in chunks], pa.large_binary())
    order = pc.sort_indices(column)  # pyright: ignore[reportAttributeAccessIssue]
    joined = column.combine_chunks()
    parts = (joined.take(order.slice(start, NAMES_AT_ONCE)) for start in range(0, len(order), NAMES_AT_ONCE))
    return (os.fsdecode(name) for part in parts for name in part.to_pylist())


def _identity(folder: Path | str) -> tuple[int, int]:
    """Return a key that identifies a folder, by whatever path it is reached."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link in a circle
        return False


def _entry(key: str, path: str) -> Entry:
    try:
        status = os.stat(path)
    except OSError as error:
        lost = isinstance(error, FileNotFoundError) and os.path.islink(path)
        return Entry(key, 0, "", problem="it is a link to nothing" if lost else error.strerror or str(error))
    if stat.S_ISREG(status.st_mode):
        return Entry(key, status.st_size, str(status.st_mtime_ns))
    kind = next((name for test, name in KINDS if test(status.st_mode)), "something else")
    return Entry(key, 0, "", problem=f"it is {kind}, not a file")


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """Register the local folder."""
    return [LocalBackend]
