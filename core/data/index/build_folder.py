"""The folder of an index under construction: the files of one build, and those that dead builds have left."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from ...utils.files import is_stale

LEFT = "left-"
_active: set[str] = set()
"""Names of the build folders of this process that are in use."""


def build_folder_of(index: Path) -> Path:
    """Return the folder of all unfinished builds of an index."""
    return index.with_name(f".{index.name}.building")


class BuildFolder:
    """A build's own folder beside its index; several builds at once, on whatever machines, do not interfere.

    It is removed when the build succeeds, with the folders of dead builds; a failed build leaves it for the next one.
    """

    def __init__(self, index: Path) -> None:
        self.root = build_folder_of(index)
        self.folder = self.root / f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:12]}"

    def __enter__(self) -> Self:
        _active.add(self.folder.name)
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            for folder in filter(_is_dead, self._others()):
                shutil.rmtree(folder, ignore_errors=True)  # another build may be at it
            shutil.rmtree(self.folder)
            with suppress(OSError):  # not empty: somebody else is building
                self.root.rmdir()
        else:
            self.folder.rename(self.root / f"{LEFT}{self.folder.name}")
        _active.discard(self.folder.name)

    def _others(self) -> list[Path]:
        return [path for path in sorted(self.root.iterdir()) if path != self.folder]

    def left(self, pattern: str) -> Iterator[Path]:
        """Yield files that other builds, dead or not, have written; open them at once, for they may be removed at any
        time.
        """
        for folder in self._others():
            yield from sorted(folder.glob(pattern))


def _is_dead(folder: Path) -> bool:
    """Return whether the build that made the folder has surely ended."""
    if folder.name.startswith(LEFT) or is_stale(folder):
        return True
    host, pid, _ = folder.name.rsplit("-", 2)
    if host != socket.gethostname():
        return False
    return folder.name not in _active if int(pid) == os.getpid() else not _is_running(int(pid))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
