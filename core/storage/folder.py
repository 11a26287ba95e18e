"""A folder of this machine, as a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..plugin_api.backend import Entry
from ..utils.files import write_whole
from .store import Fetched, RemoteStore


class FolderStore(RemoteStore):
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, str(root)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Files whose keys begin with `prefix`, in sorted key order."""
        yield from self._walk(self.root, "", prefix, (os.path.realpath(self.root),))

    def _walk(self, folder: Path, above: str, prefix: str, parents: tuple[str, ...]) -> Iterator[Entry]:
        with os.scandir(folder) as scan:
            found = sorted((above + item.name + "/" * item.is_dir(), item) for item in scan)
        for key, item in found:
            if item.is_dir() and (key.startswith(prefix) or prefix.startswith(key)):
                real = os.path.realpath(item.path)
                if real not in parents:  # a link back to a folder above
                    yield from self._walk(Path(item.path), key, prefix, (*parents, real))
            elif item.is_file() and key.startswith(prefix):
                status = item.stat()
                yield Entry(key, status.st_size, str(status.st_mtime_ns))

    def open(self, key: str) -> BinaryIO:
        """The file."""
        return (self.root / key).open("rb")

    def read(self, key: str) -> bytes:
        """The whole file."""
        return (self.root / key).read_bytes()

    def fetch(self, key: str, start: int, length: int, *, version: str = "") -> Fetched:
        """A part of the file."""
        with self.open(key) as stream:
            status = os.fstat(stream.fileno())
            stream.seek(start)
            return Fetched(stream.read(length), start, status.st_size, str(status.st_mtime_ns))

    def write(self, key: str, data: bytes) -> None:
        """Write the file whole or not at all."""
        write_whole(self.root / key, data)

    def exists(self, key: str) -> bool:
        """Return whether the file is there."""
        return (self.root / key).is_file()

    def stat(self, key: str) -> Entry:
        """Size and modification time."""
        status = (self.root / key).stat()
        return Entry(key, status.st_size, str(status.st_mtime_ns))

    def delete(self, key: str) -> None:
        """Remove the file."""
        (self.root / key).unlink(missing_ok=True)
