"""The members of a tar archive; of a damaged archive, those before the damage."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

GZIP = b"\x1f\x8b"
OTHER = (GZIP, b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")
"""Beginnings of compressed files."""


class Damaged(Exception):
    """An archive that cannot be read to its end; the text says why."""


@dataclass(frozen=True)
class Member:
    """A file in an archive: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


def members(stream: BinaryIO, size: int) -> Iterator[Member]:
    """Yield the files in an archive of `size` bytes, in order. Raises Damaged behind the last whole one."""
    archive = _open(stream)
    while (found := _next(archive)) is not None:
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue] - else it keeps all of them
        if not found.isreg():
            continue
        name = found.name.removeprefix("./")
        if found.offset_data + found.size > size:
            raise Damaged(f"it is cut short in {name!r} (byte {size:,})")
        yield Member(name, found.offset_data, found.size)
    end = archive.offset
    stream.seek(end)
    if any(stream.read(tarfile.BLOCKSIZE)):
        raise Damaged(f"it is damaged at byte {end:,}")


def _open(stream: BinaryIO) -> tarfile.TarFile:
    head = stream.read(512)
    stream.seek(0)
    if head.startswith(OTHER):
        raise Damaged("it is compressed, so that its members cannot be read one by one: unpack it (gunzip)")
    try:
        return tarfile.open(fileobj=stream, mode="r:", errorlevel=1)
    except tarfile.TarError as error:
        raise Damaged("it is empty" if not head else f"it is no tar archive ({error})") from error


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except tarfile.TarError as error:
        raise Damaged(f"it is damaged at byte {archive.offset:,} ({error})") from error
