# pyright: reportAttributeAccessIssue=false
"""Images of a source that can only be read in its order: walked over, with resume points by which reading goes on.

Resume points are kept beside the index as reading advances: (place, what the source goes on by). A reader that wants
images from the middle, after a kill or for an evaluation, starts at the last mark before the first one that it wants,
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

MARK_EVERY = 256
"""Positions between two resume points at least."""
LEAP = 1024
"""Positions that a leap must save to be worth starting the source anew."""

Opener = Callable[[], BinaryIO]


def resume_points_path(index: Path) -> Path:
    """Where the resume points of the source with this index lie."""
    return index.with_suffix(".resume points.jsonl")


def positions_of(index: Index, rows: Int64s) -> Int64s:
    """Where the images of index rows lie in a source that is read in its order, shape (n,)."""
    return pc.cast(index.table["place"].take(rows), "int64").to_numpy()


class ResumePoints:
    """Positions where reading can go on, with what the source goes on by; the start is always one.

    Args:
        path: Where they are kept, by all processes.
        source: What the source says of itself: resume points of another one are of no use.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, blake2b(source.encode(), digest_size=16).hexdigest()
        found = {0: ""} | dict(self._read())
        self._positions = sorted(found)
        self._resumes = [found[place] for place in self._positions]

    def _read(self) -> Iterator[tuple[int, str]]:
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            try:
                source, place, resume = json.loads(line)
            except ValueError:  # a line that a crash has torn
                continue
            if source == self._source:
                yield place, resume

    def before(self, place: int) -> tuple[int, str]:
        """The last mark from which `place` is still ahead."""
        number = bisect_right(self._positions, place) - 1
        return self._positions[number], self._resumes[number]

    def note(self, place: int, resume: str) -> None:
        """Keep a mark, unless there is one nearby."""
        number = bisect_right(self._positions, place)
        if place - self._positions[number - 1] < MARK_EVERY:
            return
        append_line(self._path, json.dumps([self._source, place, resume]))
        self._positions.insert(number, place)
        self._resumes.insert(number, resume)


def read_in_order(backend: SampleBackend, index: Path, wanted: Int64s) -> Iterator[tuple[int, Opener]]:
    """Some images of a source that is read in its order; those that do not pass by are left out.

    Args:
        backend: The source.
        index: File of its index.
        wanted: Their places, growing, shape (n,).
    """
    marks, position = ResumePoints(resume_points_path(index), backend.identity()), 0
    while len(ahead := wanted[np.searchsorted(wanted, position) :]):
        with closing(backend.sequential(marks.before(int(ahead[0]))[1])) as chunks:
            for chunk in chunks:
                yield from _picked(chunk, ahead)
                position = chunk.end
                marks.note(position, chunk.resume)
                ahead = ahead[np.searchsorted(ahead, position) :]
                if not len(ahead) or marks.before(int(ahead[0]))[0] - position >= LEAP:
                    break
            else:
                return


def _picked(chunk: SequentialChunk, wanted: Int64s) -> Iterator[tuple[int, Opener]]:
    found = np.searchsorted(wanted, chunk.positions)
    for place, opener, number in zip(chunk.positions, chunk.images, found.tolist(), strict=True):
        if number < len(wanted) and wanted[number] == place:
            yield place, opener
