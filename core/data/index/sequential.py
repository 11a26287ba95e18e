# pyright: reportAttributeAccessIssue=false
"""Images of a source that can only be read in its own order, with resume points from which reading can go on.

Resume points are saved beside the index as reading advances: (position, the source's token for going on). A reader that
wants images from the middle, after a kill or for an evaluation, starts at the last resume point before the first one,
and leaps over stretches in which it wants none.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.compute as pc

from ...plugin_api.backend import SampleBackend, SequentialChunk
from ...utils.files import append_line
from ..hashing import Int64s
from .index import Index

RESUME_POINT_EVERY = 256
"""Least distance in positions between two resume points."""
LEAP = 1024
"""Positions that a leap must save to be worth starting the source anew."""

Opener = Callable[[], BinaryIO]


def resume_points_path(index: Path) -> Path:
    """Return the path of the resume points of the source with this index."""
    return index.with_suffix(".resume-points.jsonl")


def positions_of(index: Index, rows: Int64s) -> Int64s:
    """Return the positions of index rows in a source that is read in its own order, shape (n,)."""
    return pc.cast(index.table["position"].take(rows), "int64").to_numpy()


class ResumePoints:
    """The positions at which reading can go on, each with the source's token for it; the start is always one.

    Args:
        path: File of the resume points of all processes.
        source: Identity of the source; resume points of another one are ignored.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, blake2b(source.encode(), digest_size=16).hexdigest()
        found = {0: ""} | dict(self._read())
        self._positions = sorted(found)
        self._resumes = [found[position] for position in self._positions]

    def _read(self) -> Iterator[tuple[int, str]]:
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            try:
                source, position, resume = json.loads(line)
            except ValueError:  # a line that a crash has torn
                continue
            if source == self._source:
                yield position, resume

    def before(self, position: int) -> tuple[int, str]:
        """Return the last resume point from which `position` is still ahead, with its token."""
        number = bisect_right(self._positions, position) - 1
        return self._positions[number], self._resumes[number]

    def note(self, position: int, resume: str) -> None:
        """Keep a resume point, unless there is one nearby."""
        number = bisect_right(self._positions, position)
        if position - self._positions[number - 1] < RESUME_POINT_EVERY:
            return
        append_line(self._path, json.dumps([self._source, position, resume]))
        self._positions.insert(number, position)
        self._resumes.insert(number, resume)


def read_in_order(backend: SampleBackend, index: Path, wanted: Int64s) -> Iterator[tuple[int, Opener]]:
    """Yield (position, opener) for some images of a sequential source; images that it does not deliver are left out.

    Args:
        backend: The source.
        index: File of its index.
        wanted: Their positions, growing, shape (n,).
    """
    points, position = ResumePoints(resume_points_path(index), backend.identity()), 0
    while len(ahead := wanted[np.searchsorted(wanted, position) :]):
        with closing(backend.sequential(points.before(int(ahead[0]))[1])) as chunks:
            for chunk in chunks:
                yield from _picked(chunk, ahead)
                position = chunk.end
                points.note(position, chunk.resume)
                ahead = ahead[np.searchsorted(ahead, position) :]
                if not len(ahead) or points.before(int(ahead[0]))[0] - position >= LEAP:
                    break
            else:
                return


def _picked(chunk: SequentialChunk, wanted: Int64s) -> Iterator[tuple[int, Opener]]:
    found = np.searchsorted(wanted, chunk.positions)
    for position, opener, number in zip(chunk.positions, chunk.images, found.tolist(), strict=True):
        if number < len(wanted) and wanted[number] == position:
            yield position, opener
