"""The files that say what a cache holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DESCRIPTOR = "descriptor.json"


@dataclass(frozen=True)
class Shard:
    """A line of a manifest: one shard file."""

    file: str
    count: int
    size: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Failure:
    """Something that could not be encoded, kept so that it is not tried at every start."""

    key: str
    name: str
    reason: str


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a manifest; a last one that a crash has torn is skipped, for what it names is not there."""
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def whole_text(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """A manifest of these lines."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
