"""Shards of tar archives: images, each with its caption beside it under the same name (the WebDataset layout)."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, BinaryIO

from pydantic import BeforeValidator, Field

from ..core.data.samples.captions import read_text
from ..core.data.tables.columns import CAPTIONS, CaptionColumns, Columns, Row, edge_of, names_in, value_of
from ..core.data.tables.locations import Location, identity_of, locate
from ..core.errors import BadValue
from ..core.plugin_api.backend import DataBackend, SampleBackend, SampleChunk
from ..core.plugin_api.hookspecs import hookimpl
from ..core.settings.dataset_settings import ColumnSettings
from ..core.settings.types import PathOrUrl, one_or_many
from ..core.storage import is_remote
from ._rows import Sample, chunk_of, digest
from ._tar import Damaged, Member, members

SHARDS_AT_ONCE = 8
"""Shards that are read at the same time."""
TEXT, JSON = ".txt", ".json"
LARGEST_TEXT = 2**20
"""Bytes of a caption or of a .json member at most."""


class WebDatasetBackend(SampleBackend):
    """Images in .tar shards, each with a .txt or a .json of the same name. A sample's name is its image's."""

    name = "webdataset"

    class Config(ColumnSettings):
        """The shards, and the meaning of the values in .json members."""

        shards: Annotated[tuple[PathOrUrl, ...], Field(min_length=1), BeforeValidator(one_or_many)]
        """One or several: a .tar file, a folder of them, a glob or a brace range `{000..012}`, here or as a URL."""

    @property
    def location(self) -> str:
        """The paths and URLs of the shards."""
        return ", ".join(self.config.shards)

    @cached_property
    def files(self) -> Sequence[Location]:
        """The shards. Raises BadValue where there is none."""
        return locate("shards", self.config.shards, (".tar",))

    def identity(self) -> str:
        """Return a hash of the names, sizes and versions of the shards, and of what is read in them."""
        return identity_of(self.files, self.config.model_dump(mode="json", exclude={"shards"}))

    def check_samples(self, *, images: bool, captions: bool) -> None:
        """Check that the first shard is there and is an archive, unless it is remote."""
        del images, captions
        if any(map(is_remote, self.config.shards)):
            return
        with self.files[0].open() as stream:
            try:
                next(members(stream, self.files[0].size), None)
            except Damaged as error:
                remedy = "give .tar archives that are whole (an image and its .txt or .json side by side)"
                raise BadValue("shards", self.files[0].path, str(error), remedy) from error

    def samples(self, *, images: bool = True) -> Iterator[SampleChunk]:
        """Yield the samples of all shards, some shards at a time; images are hashed and their headers read."""

        def scan(number: int) -> list[Sample]:
            return Shard(number, self.files[number], self.config, images=images).samples()

        for found in _several(scan, range(len(self.files))):
            yield chunk_of(found)

    def open(self, key: str) -> BinaryIO:
        """Open an image's bytes; that part of its shard is read, and no other."""
        shard, offset, size = map(int, key.split(":"))
        data = self.files[shard].read(offset, size)
        if len(data) != size:
            raise FileNotFoundError(f"{self.files[shard].path} ends before it")
        return io.BytesIO(data)


def _several(work: Callable[[int], list[Sample]], items: Sequence[int]) -> Iterator[list[Sample]]:
    """Yield results of `work` in order, some computed at the same time."""
    pool = ThreadPoolExecutor(SHARDS_AT_ONCE)
    waiting: deque[Future[list[Sample]]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > SHARDS_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _Group:
    """Text members of one name; their bytes as they are."""

    text: bytes | None = None
    record: bytes | None = None


class Shard:
    """One archive.

    Args:
        number: Its number among all.
        file: Its location.
        config: The columns of .json members.
        images: Whether images are read.
    """

    def __init__(self, number: int, file: Location, config: Any, *, images: bool) -> None:
        self.number, self.file, self.config, self.images = number, file, config, images

    def samples(self) -> list[Sample]:
        """Return its images (or, without images, whatever has a caption), and behind them what is wrong with the
        archive.
        """
        found: list[Sample] = []
        groups: dict[str, _Group] = {}
        damage = []
        with self.file.open() as stream:
            try:
                for member in members(stream, self.file.size):
                    self._take(member, stream, found, groups)
            except Damaged as error:
                damage = [Sample(self.file.name, problem=f"{error}; {len(found):,} images before that are used")]
        if not self.images:
            shown = {_stem(sample.key) for sample in found}
            found += [Sample(name) for name in groups if name not in shown]
        return [*(self._captioned(sample, groups) for sample in found), *damage]

    def _take(self, member: Member, stream: BinaryIO, found: list[Sample], groups: dict[str, _Group]) -> None:
        from ..core.data.samples.images import SUFFIXES

        path = PurePosixPath(member.name)
        if any(part.startswith(".") for part in path.parts):
            return
        suffix = path.suffix.lower()
        if suffix[1:] in SUFFIXES:
            found.append(self._image(member, stream) if self.images else Sample(member.name))
        elif suffix in (TEXT, JSON):
            group = groups.setdefault(_stem(member.name), _Group())
            stream.seek(member.offset)
            data = stream.read(min(member.size, LARGEST_TEXT + 1))
            if suffix == TEXT:
                group.text = data
            else:
                group.record = data

    def _image(self, member: Member, stream: BinaryIO) -> Sample:
        from ..core.data.samples.images import BrokenImage, probe

        stream.seek(member.offset)
        data = stream.read(member.size)
        position = f"{self.number}:{member.offset}:{member.size}"
        try:
            return Sample(member.name, position, member.size, digest(data), (), *probe(io.BytesIO(data)))
        except BrokenImage as error:
            return Sample(member.name, position, member.size, digest(data), problem=str(error))

    def _captioned(self, sample: Sample, groups: Mapping[str, _Group]) -> Sample:
        group = groups.get(_stem(sample.key), _Group())
        try:
            record = _record(group.record)
            texts = self._texts(group, record)
        except ValueError as error:
            return sample.but(problem=sample.problem or str(error))
        config = self.config
        name = value_of(record, config.filename_column) if config.filename_column is not None else None
        edges = [value_of(record, each) if each else None for each in (config.width_column, config.height_column)]
        width, height = map(edge_of, edges)
        key = sample.key if name in (None, "") else str(name)
        return sample.but(key=key, captions=texts, width=width or sample.width, height=height or sample.height)

    def _texts(self, group: _Group, record: Row) -> list[str]:
        main, fallback = self.config.caption_column, self.config.fallback_caption_column
        if group.text is not None and not main:
            return [_text(group.text, "its caption")]
        usual = Columns(names_in(record), "").usual(CAPTIONS)
        return CaptionColumns(main or [usual or CAPTIONS[0]], fallback).texts(record)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _text(data: bytes, what: str) -> str:
    if len(data) > LARGEST_TEXT:
        raise ValueError(f"{what} has more than {LARGEST_TEXT // 2**20} MiB")
    return read_text(data, what=what)


def _record(data: bytes | None) -> Row:
    """Parse a .json member. Raises ValueError where it is no object."""
    if data is None:
        return {}
    try:
        found = json.loads(_text(data, "its .json"))
    except json.JSONDecodeError as error:
        raise ValueError(f"its .json is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from error
    if not isinstance(found, dict):
        raise ValueError("its .json is not an object")
    return found


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """Register the shards."""
    return [WebDatasetBackend]
