"""Datasets of the Hugging Face hub and their formats on this machine, through the `datasets` library."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar

from pydantic import Field, field_validator

from ..core.data.index.index import FILTERED
from ..core.data.tables.columns import Row, value_of
from ..core.errors import BadValue
from ..core.plugin_api.backend import DataBackend, SampleBackend, SampleChunk, SequentialChunk
from ..core.plugin_api.hookspecs import hookimpl
from ..core.settings.dataset_settings import ColumnSettings
from ..core.settings.types import HubOrPath, LocalPath
from ..core.utils.packages import missing_packages
from ._hf_filter import Filter
from ._hf_layout import Layout
from ._hf_source import Source

CHUNK = 512
"""Samples that are handed on at a time."""
GROUP = 16
"""Images of a stream that are handed on at a time."""
HUB_PATH = re.compile(r"hf://datasets/[^@]+@[^/]+/(?P<key>.+)")
SNAPSHOT = re.compile(r".*/snapshots/[0-9a-f]+/(?P<key>.+)")


def probe(stream: BinaryIO) -> tuple[int, int]:
    """Return upright width and height in pixels from the header; Pillow is imported on the first call."""
    from ..core.data.samples import images

    return images.probe(stream)


class HuggingFaceBackend(SampleBackend):
    """Rows of a dataset that the `datasets` library reads: from the hub, from files, folders, tars, `save_to_disk`."""

    name = "huggingface"
    aliases = ("hf",)
    key_aliases: ClassVar[Mapping[str, str]] = {"name_column": "filename_column"}
    packages: ClassVar[Mapping[str, str]] = {"datasets": "distill-engine[huggingface]"}

    class Config(ColumnSettings):
        """The dataset, and the meaning of its columns."""

        dataset_name: HubOrPath
        """Hub id; or a folder or file of this machine (Parquet, Arrow, JSON, CSV, tars, images with metadata,
        `save_to_disk`); or the name of a format, with data_files."""
        dataset_config: str | None = None
        """Configuration of the dataset, where it has several."""
        data_files: tuple[HubOrPath, ...] = ()
        """The files of the dataset, where not all are wanted or dataset_name is a format: `parquet`, `arrow`, `json`,
        `csv`, `text`, `imagefolder`, `webdataset`."""
        split: str = "train"
        """Split, or a part of one: `train[:1%]`; of a stream in rows: `train[:1000]`."""
        revision: str = "main"
        """Branch, tag or commit on the hub. Once all is cached, a commit (40 digits) is not asked for on the hub."""
        image_column: str | None = None
        """Column of the images. Absent: `image`, else the only column of images."""
        streaming: bool = False
        """Read the dataset in its order without downloading it, once for sizes and captions and once for latents."""
        filter_func: dict[str, Any] = Field(default_factory=dict)
        """Conditions that samples must meet: column and value, list of values or comparisons (`{">=": 5}`); also
        quality_thresholds with quality_column, min_width, min_height (pixels). Never code."""
        cache_dir: LocalPath | None = None
        """Folder of the library's downloads; absent: its own (HF_HOME)."""
        num_proc: int | None = Field(default=None, ge=1)
        """Processes that prepare a downloaded dataset; absent: one."""

        @field_validator("filter_func")
        @classmethod
        def _conditions(cls, given: dict[str, Any]) -> dict[str, Any]:
            Filter.of(given)
            return given

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.source = Source(config)

    @property
    def location(self) -> str:
        """The dataset with its configuration and split."""
        config = self.config
        parts = [config.dataset_name, *filter(None, [config.dataset_config]), config.split]
        return " ".join(parts)

    def check(self) -> None:
        """Check that the package is installed, the paths exist and, on this machine, the split."""
        missing = missing_packages(self.packages)
        if missing:
            install = f"pip install '{self.packages['datasets']}'"
            raise BadValue("type", self.name, missing, install)
        self.source.check()
        if not self.source.on_hub:
            self.identity()

    def check_samples(self, *, images: bool, captions: bool) -> None:
        """Check that the columns exist, for a dataset on this machine. Raises BadValue."""
        if not self.source.on_hub:
            Layout.of(self.config, self.source.features, images=images, captions=captions)

    def identity(self) -> str:
        """Return the library's identity of the dataset, with the keys that choose samples of it."""
        ours = self.config.model_dump(mode="json", exclude={"cache_dir", "num_proc", "revision"})
        return json.dumps([self.source.identity(), ours])

    @property
    def in_order(self) -> bool:
        """True with `streaming`."""
        return self.config.streaming

    # -- samples ----------------------------------------------------------------------------------------------------

    @cached_property
    def _version(self) -> str:
        """The version of images that are not examined: they may have changed whenever the dataset has."""
        return blake2b(self.source.identity().encode(), digest_size=16).hexdigest()

    @cached_property
    def _layout(self) -> Layout:
        return Layout.of(self.config, self.source.features, images=True, captions=False)

    def samples(self, *, images: bool = True) -> Iterator[SampleChunk]:
        """Yield all rows in their order; without images the columns of images are not read."""
        layout = self._layout if images else Layout.of(self.config, self.source.features, images=False, captions=True)
        return self._samples(layout, "")

    def samples_after(self, resume: str) -> Iterator[SampleChunk]:
        """Yield the rows behind a chunk."""
        return self._samples(self._layout, resume)

    def _samples(self, layout: Layout, resume: str) -> Iterator[SampleChunk]:
        rows = self.source.scan(layout.columns, layout.image if layout.looks_at_images else None, resume)
        # a row at a time: its image is let go before the next one comes
        seen = ((self._sample(layout, number, row), resume_point) for number, row, resume_point in rows)
        while taken := list(islice(seen, CHUNK)):
            columns = zip(*(sample.columns() for sample, _ in taken), strict=True)
            yield SampleChunk(*map(list, columns), resume=taken[-1][1]())

    def _sample(self, layout: Layout, number: int, row: Row) -> Sample:
        sample = Sample(str(number), self._key(layout, number, row))
        if not layout.filter.passes(row):
            sample.problem = FILTERED
            return sample
        try:
            sample.captions = layout.texts(row)
            if layout.image is not None:
                self._look_at(layout, row, sample)
        except ValueError as error:
            sample.problem = str(error)
        if sample.width and not layout.filter.fits(sample.width, sample.height):
            sample.problem = FILTERED
        return sample

    def _look_at(self, layout: Layout, row: Row, sample: Sample) -> None:
        """Fill in size, version, width and height of an image. Raises ValueError when it cannot be used."""
        sample.width, sample.height = layout.size(row)
        if not layout.looks_at_images:
            sample.version = self._version
            if not sample.width and self.in_order:
                raise ValueError(f"{' or '.join(layout.sizes or ())} holds no size")
            return
        from ..core.data.samples.images import BrokenImage

        found = self._image(row[layout.image or ""])
        if isinstance(found, bytes):
            sample.size, sample.version = len(found), blake2b(found, digest_size=16).hexdigest()
        else:
            sample.size, sample.version = _stamp(found)
            if not self.in_order:
                return  # its header is read by those who open it, several at a time
        try:
            if not sample.width:
                with self._opened(found) as stream:
                    sample.width, sample.height = probe(stream)
        except BrokenImage as error:
            raise ValueError(str(error)) from error
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(error.strerror or str(error)) from error

    # -- images ---------------------------------------------------------------------------------------------------

    def _image(self, value: object) -> bytes | str:
        """Return an image's bytes, or the path or URL of its file. Raises ValueError when there is none."""
        path: object = None
        if isinstance(value, Mapping):
            value, path = value.get("bytes"), value.get("path")
        elif isinstance(value, str):
            value, path = None, value
        if isinstance(value, bytes):
            return value
        if value is not None or not isinstance(path, str):
            raise ValueError("it has no image" if value is None else f"its image is {type(value).__name__}")
        return self._allowed_path(path)

    def _allowed_path(self, path: str) -> str:
        """Return an absolute path or a URL. Raises ValueError where a foreign dataset names a path of this machine."""
        folder = self.source.folder
        if "://" in path:
            return path
        if folder is not None:
            return str(folder / path)
        from datasets import config as library
        from huggingface_hub import constants

        homes = [library.HF_DATASETS_CACHE, constants.HF_HUB_CACHE, self.config.cache_dir or library.HF_DATASETS_CACHE]
        if not any(Path(path).resolve().is_relative_to(Path(home).resolve()) for home in homes):
            raise ValueError(f"it names the file {path!r} of this machine")
        return path

    def _opened(self, found: bytes | str) -> BinaryIO:
        """Open the bytes of an image. Raises FileNotFoundError, PermissionError; OutOfReach for a remote file."""
        if isinstance(found, bytes):
            return io.BytesIO(found)
        return self.source.fetched(found) if "://" in found else Path(found).open("rb")

    def _key(self, layout: Layout, number: int, row: Row) -> str:
        """Return the sample's name: from its column, else its image's path, else its row's number."""
        name = value_of(row, layout.name) if layout.name is not None else None
        if name is not None:
            return str(name)
        value = row.get(layout.image) if layout.image is not None else None
        path = value.get("path") if isinstance(value, Mapping) else value
        return self._relative(path) if isinstance(path, str) and path else f"{number:09d}"

    def _relative(self, path: str) -> str:
        """Return an image's path within its dataset."""
        for pattern in (HUB_PATH, SNAPSHOT):
            match = pattern.fullmatch(path)
            if match is not None:
                return match["key"]
        folder = self.source.folder
        if folder is not None and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
        return PurePosixPath(path).name if "://" in path or path.startswith("/") else os.path.normpath(path)

    @cached_property
    def _images(self) -> Any:
        assert self._layout.image is not None
        return self.source.table([self._layout.image], self._layout.image)

    def open(self, key: str) -> BinaryIO:
        """Open the image of one row."""
        try:
            found = self._image(self._images[int(key)][self._layout.image])
        except (ValueError, IndexError) as error:  # no image there; no such row any more
            raise FileNotFoundError(str(error)) from error
        return self._opened(found)

    def sequential(self, resume: str = "") -> Generator[SequentialChunk, None, None]:
        """Yield the images of a stream; nothing else of it is read."""
        image = self._layout.image
        assert image is not None
        rows = self.source.scan([image], image, resume)
        while taken := list(islice(rows, GROUP)):
            openers = [partial(self._open_value, row[image]) for _, row, _ in taken]
            yield SequentialChunk([number for number, _, _ in taken], openers, taken[-1][0] + 1, taken[-1][2]())

    def _open_value(self, value: object) -> BinaryIO:
        try:
            return self._opened(self._image(value))
        except ValueError as error:
            raise FileNotFoundError(str(error)) from error


@dataclass
class Sample:
    """One row, as :class:`distill.core.plugin_api.backend.SampleChunk` has it."""

    position: str
    key: str
    size: int = 0
    version: str = ""
    captions: list[str] = field(default_factory=list)
    width: int = 0
    height: int = 0
    problem: str = ""

    def columns(self) -> tuple[Any, ...]:
        """Return the attributes in the order of the chunk's columns."""
        return self.key, self.position, self.size, self.version, self.captions, self.width, self.height, self.problem


def _stamp(path: str) -> tuple[int, str]:
    """Return size and version of a file; for a URL, which names the commit, the URL itself."""
    if "://" in path:
        return 0, path
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    return status.st_size, str(status.st_mtime_ns)


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """Register datasets of the hub and their formats."""
    return [HuggingFaceBackend]
