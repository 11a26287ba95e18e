"""Conversion of table rows to samples: their names, positions, captions and sizes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import PurePath, PurePosixPath
from typing import Any

from ..core.data.tables.columns import CAPTIONS, CaptionColumns, Columns, Row, edge_of, value_of
from ..core.data.tables.locations import Location, at
from ..core.errors import BadValue
from ..core.plugin_api.backend import SampleChunk
from ..core.storage import is_remote

IMAGES = ("image", "file_name", "filename", "path", "image_path", "url", "image_url")
"""Columns of images that are looked for where none is named."""
BYTES, PATH = "bytes", "path"
"""Fields of an image's struct, as Hugging Face's libraries write it."""
AT = "at:"
"""Prefix of the positions of images that are files, ``at:TABLE:PATH``; those inside a table have a row number."""


@dataclass(frozen=True)
class Sample:
    """One row."""

    key: str
    position: str = ""
    size: int = 0
    version: str = ""
    captions: Sequence[str] = ()
    width: int = 0
    height: int = 0
    problem: str = ""

    def but(self, **changes: Any) -> Sample:
        """Return the sample with some attributes changed."""
        return replace(self, **changes)


def chunk_of(samples: Sequence[Sample]) -> SampleChunk:
    """Return samples in columns."""
    return SampleChunk(
        [each.key for each in samples], [each.position for each in samples], [each.size for each in samples],
        [each.version for each in samples], [each.captions for each in samples], [each.width for each in samples],
        [each.height for each in samples], [each.problem for each in samples],
    )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The columns that hold images, captions, names and sizes.

    Attributes:
        image: The column of images; None where there is none, which suffices for captions alone.
        captions: The columns of captions; None where there are none.
        name: The column of names.
        width: The column of widths.
        height: The column of heights.
    """

    image: str | None
    captions: CaptionColumns | None
    name: str | None
    width: str | None
    height: str | None

    @classmethod
    def of(cls, columns: Columns, config: Any, *, images: bool, captions: bool = False) -> Layout:
        """Choose the columns that the entry's keys name, or the usual ones.

        Args:
            columns: Those that there are.
            config: The entry's own keys.
            images: Whether there must be images.
            captions: Whether there must be captions.

        Raises:
            BadValue: A column is not there.
        """
        given = [config.image_column] if config.image_column is not None else []
        if images:
            image = columns.required("image_column", given, IMAGES)[0]
        else:
            image = next(iter(columns.wanted("image_column", given)), None) or columns.usual(IMAGES)
        found = None
        if captions or config.caption_column or config.fallback_caption_column or columns.usual(CAPTIONS):
            found = CaptionColumns.of(columns, config.caption_column, config.fallback_caption_column)
        one = {
            key: next(iter(columns.wanted(key, [name])), None) if (name := getattr(config, key)) is not None else None
            for key in ("filename_column", "width_column", "height_column")
        }
        width, height = one["width_column"], one["height_column"]
        if (width is None) != (height is None):
            missing = "width_column" if width is None else "height_column"
            raise BadValue(missing, None, "is required beside the other edge's column", "name both or neither")
        return cls(image, found, one["filename_column"], width, height)


def root_of(config: Any, table: Location) -> str:
    """Return the folder or URL that paths in the table are relative to: ``instance_data_dir``, else the folder of the
    table.
    """
    if config.instance_data_dir is not None:
        return config.instance_data_dir.rstrip("/") or "/"
    return table.path.rpartition("/")[0] or "/"


def resolved(path: str, root: str) -> str:
    """Return the whole path or URL of an image, from the path in a table."""
    return path if is_remote(path) or PurePath(path).is_absolute() else f"{root}/{path}"


class Reader:
    """The reader that makes samples of rows.

    Args:
        layout: Meaning of the columns.
        root: The folder or URL that paths are relative to.
        table: Number of the table.
    """

    def __init__(self, layout: Layout, root: str, table: int) -> None:
        self.layout, self.root, self.table = layout, root, table

    def columns(self, there: Columns, *, images: bool, inside: bool) -> list[str]:
        """List the columns of a table that must be read.

        Args:
            there: The columns that it has.
            images: Whether images are wanted.
            inside: Whether the column of images holds their bytes.
        """
        layout, image = self.layout, self.layout.image
        wanted = [layout.name, layout.width, layout.height, *(layout.captions.names if layout.captions else ())]
        if image is not None and not images and inside:
            image = f"{image}.{PATH}" if there.has(f"{image}.{PATH}") else None
        return [name for name in (image, *wanted) if name is not None]

    def sample(self, number: int, row: Row) -> Sample:
        """Return the sample of a row, whose image is examined.

        Args:
            number: Number of the row among all, from 0.
            row: Values of its columns.
        """
        from ..core.data.samples.images import BrokenImage, probe

        data, path = self._image(row)
        key = self._key(number, row, path)
        try:
            captions = self.layout.captions.texts(row) if self.layout.captions else []
            width, height = self._edges(row)
            if data is not None:
                size = (width, height) if width and height else probe(io.BytesIO(data))
                return Sample(key, str(number), len(data), digest(data), captions, *size)
            if not path:
                return Sample(key, problem=f"it has no image: the column {self.layout.image!r} is empty")
            return self._file(key, path, captions, width, height)
        except (BrokenImage, ValueError) as error:
            return Sample(key, problem=str(error))
        except OSError as error:
            return Sample(key, problem=error.strerror or str(error))

    def prompt(self, number: int, row: Row) -> Sample:
        """Return the captions of a row, under the name that its image has."""
        key = self._key(number, row, self._image(row)[1])
        try:
            return Sample(key, captions=self.layout.captions.texts(row) if self.layout.captions else [])
        except ValueError as error:
            return Sample(key, problem=str(error))

    def _file(self, key: str, path: str, captions: Sequence[str], width: int, height: int) -> Sample:
        position = f"{AT}{self.table}:{path}"
        if is_remote(whole := resolved(path, self.root)):  # all that is known of it without asking
            return Sample(key, position, 0, digest(whole.encode()), captions, width, height)
        file = at(whole).known()
        return Sample(key, position, file.size, file.version, captions, width, height)

    def _image(self, row: Row) -> tuple[bytes | None, str | None]:
        """Return bytes and path of a row's image; either may be None."""
        value = value_of(row, self.layout.image) if self.layout.image is not None else None
        data, path = (value.get(BYTES), value.get(PATH)) if isinstance(value, Mapping) else (value, value)
        return data if isinstance(data, bytes) else None, path.strip() if isinstance(path, str) else None

    def _key(self, number: int, row: Row, path: str | None) -> str:
        if self.layout.name is not None:
            name = value_of(row, self.layout.name)
            return str(name) if name not in (None, "") else f"row-{number:09d}"
        return self.named(path) if path else f"row-{number:09d}"

    def named(self, path: str) -> str:
        """Return the name of an image that has a path: as written, or relative to the root; of a URL, without its
        query, which may be a signature.
        """
        if not is_remote(path) and not PurePath(path).is_absolute():
            return str(PurePosixPath(path))
        inside = path.removeprefix(f"{self.root}/")
        plain, question, query = inside.partition("://")[2].partition("?") if is_remote(inside) else (inside, "", "")
        return f"{plain}?{digest(query.encode())[:8]}" if question else plain

    def _edges(self, row: Row) -> tuple[int, int]:
        if self.layout.width is None or self.layout.height is None:
            return 0, 0
        return edge_of(value_of(row, self.layout.width)), edge_of(value_of(row, self.layout.height))


def digest(data: bytes) -> str:
    """Return the hash of an image's bytes, which serves as its version."""
    return blake2b(data, digest_size=16).hexdigest()
