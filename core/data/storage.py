"""Files that are either whole or not there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from uuid import uuid4

from ..files import sync_folder

PARTIAL = ".partial-"
STALE_SECONDS = 24 * 3600
"""Leftovers of killed writers are removed when they are older than this: younger ones may belong to a running one."""


def partial_of(path: Path) -> Path:
    """Where `path` is written before it is renamed: no other process, on whatever machine, writes there."""
    return path.with_name(f"{PARTIAL}{uuid4().hex[:12]}-{path.name}")


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write `path` so that no reader and no crash ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line; a crash leaves at most a torn last line, which readers skip."""
    with path.open("ab") as stream:
        stream.write(line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def is_stale(path: Path) -> bool:
    """Whether a leftover is old enough that its writer must be gone."""
    try:
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return False
