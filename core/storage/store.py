"""What every place of objects offers, and the seekable stream over ranged reads."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from ..plugin_api.backend import Entry

FIRST_BLOCK = 1 << 15
"""The first ranged read of a stream: enough for the header of nearly every JPEG."""
LARGEST_BLOCK = 1 << 23
"""Reads grow up to this while a stream is read on and on."""
KEPT_BLOCKS = 8


@dataclass(frozen=True)
class Fetched:
    """Part of an object.

    Attributes:
        data: The bytes, fewer than asked for where the object ends.
        start: Where they lie in the object: 0 where the server sent all of it instead of the range.
        total: Size of the whole object in bytes.
        version: Changes when the content does; empty where the server does not say.
    """

    data: bytes
    start: int
    total: int
    version: str


class RemoteStore(ABC):
    """Objects under keys (POSIX paths below one root).

    What is not there raises FileNotFoundError, what may not be read PermissionError, both with a reason in
    ``strerror``; a place that does not answer after its retries raises :class:`distill.core.errors.OutOfReach`.
    Safe for many threads.
    """

    url: str
    """The root, for messages; without credentials."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects whose keys begin with `prefix`, in sorted key order, fetched page by page."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def fetch(self, key: str, start: int, length: int, *, version: str = "") -> Fetched:
        """A part of an object, with its size and version.

        Args:
            key: Which object.
            start: First byte.
            length: At most so many bytes.
            version: The version that it must still have, if given; another one raises FileNotFoundError.
        """

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, fewer where the object ends."""
        fetched = self.fetch(key, start, length)
        skip = start - fetched.start
        return fetched.data[skip : skip + length]

    def open(self, key: str) -> BinaryIO:
        """A seekable stream that fetches what is read of it, so that a header costs one small request."""
        return cast(BinaryIO, io.BufferedReader(RangedStream(self, key), 1 << 13))

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write the object whole or not at all."""

    def exists(self, key: str) -> bool:
        """Return whether the object is there."""
        try:
            self.stat(key)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def stat(self, key: str) -> Entry:
        """Size and version of one object."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""


class RangedStream(io.RawIOBase):
    """A seekable stream over ranged reads of one version of an object.

    Blocks double in size while they are read one after the other, so that a header costs one small request and a whole
    object a few large ones. The blocks read last are kept.
    """

    def __init__(self, store: RemoteStore, key: str) -> None:
        self._store, self._key, self._position = store, key, 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._block, self._next = FIRST_BLOCK, 0
        first = self._store.fetch(key, 0, FIRST_BLOCK)
        self._size, self._version = first.total, first.version
        self._keep(first)

    def _keep(self, fetched: Fetched) -> None:
        self._blocks[fetched.start] = fetched.data
        self._next = fetched.start + len(fetched.data)
        while len(self._blocks) > KEPT_BLOCKS:
            self._blocks.popitem(last=False)

    def _kept(self, position: int) -> memoryview | None:
        for start, data in reversed(self._blocks.items()):
            if start <= position < start + len(data):
                self._blocks.move_to_end(start)
                return memoryview(data)[position - start :]
        return None

    def _at(self, position: int, wanted: int) -> memoryview:
        """Return some bytes at `position`, fetched together with what probably follows."""
        found = self._kept(position)
        if found is None:
            self._block = min(2 * self._block, LARGEST_BLOCK) if position == self._next else FIRST_BLOCK
            length = min(max(wanted, self._block), self._size - position)
            self._keep(self._store.fetch(self._key, position, length, version=self._version))
            found = self._kept(position)
            assert found is not None, "a fetch gives at least one byte inside the object"
        return found

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill `buffer` as far as one block goes."""
        if self._position >= self._size or not len(buffer):
            return 0
        data = self._at(self._position, len(buffer))[: len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        """The rest, in one request besides what is kept."""
        parts = []
        while self._position < self._size:
            parts.append(bytes(self._at(self._position, self._size - self._position)))
            self._position += len(parts[-1])
        return b"".join(parts)

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is fetched by it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position
