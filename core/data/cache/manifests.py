"""The manifests of a cache: files that list its shards and failures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DESCRIPTOR = "descriptor.json"


@dataclass(frozen=True)
class Shard:
    """One shard file, as a line of a manifest lists it."""

    file: str
    count: int
    size: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Failure:
    """An entry that could not be encoded, recorded so that it is not tried at every start."""

    key: str
    name: str
    reason: str


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a manifest; an incomplete last line after a crash is skipped, for its shard is not there."""
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def whole_text(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Return a manifest of these lines."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
