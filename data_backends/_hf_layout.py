"""The meaning of the columns of a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.data.tables.columns import CaptionColumns, Columns, Row, value_of
from ..core.errors import BadValue
from ._hf_filter import Filter

CAPTIONS = ("caption", "text", "txt", "prompt")
"""Columns of captions that are looked for where none is named."""


@dataclass(frozen=True)
class Layout:
    """The meaning of a dataset's columns.

    Attributes:
        image: Column of the images, None where they are not wanted.
        captions: Columns of captions, None where there are none.
        labels: Columns of numbered classes -> the classes' names.
        name: Column of the samples' names.
        sizes: Columns of width and height.
        filter: Conditions.
    """

    image: str | None
    captions: CaptionColumns | None
    labels: Mapping[str, Sequence[str]]
    name: str | None
    sizes: tuple[str, str] | None
    filter: Filter

    @classmethod
    def of(cls, config: Any, features: Mapping[str, Any], *, images: bool, captions: bool) -> Layout:
        """Choose the columns that the entry's keys name, or the usual ones.

        Args:
            config: The entry's keys.
            features: Type of each column.
            images: Whether images are wanted.
            captions: Whether there must be a column of captions.

        Raises:
            BadValue: A column is not there.
        """
        columns = Columns(list(_names(features)), "the dataset")
        main = config.caption_column or tuple(filter(None, [columns.usual(CAPTIONS)]))
        fallback = config.fallback_caption_column
        found = CaptionColumns.of(columns, main, fallback) if main or fallback or captions else None
        for key in ("filename_column", "width_column", "height_column"):
            columns.wanted(key, [name] if (name := getattr(config, key)) else [])
        chosen = Filter.of(config.filter_func)
        chosen.check(columns)
        image = _image_column(config, columns, features) if images or config.image_column else None
        sizes = (config.width_column, config.height_column)
        labels = {name: each.names for name, each in features.items() if _is_label(each)}
        named = sizes if all(sizes) else None
        return cls(image if images else None, found, labels, config.filename_column, named, chosen)

    @property
    def looks_at_images(self) -> bool:
        """True if a sample's name, size and version come from its image, rather than from other columns."""
        return self.image is not None and not (self.name and self.sizes)

    @property
    def columns(self) -> list[str]:
        """The columns of the dataset that are read to list its samples."""
        names = [self.image if self.looks_at_images else None, self.name, *(self.sizes or ()), *self.filter.names]
        names += self.captions.names if self.captions is not None else []
        return list(dict.fromkeys(name.partition(".")[0] for name in names if name))

    def texts(self, row: Row) -> list[str]:
        """Return the captions of a row. Raises ValueError that names the column."""
        if self.captions is None:
            return []
        named = {name: names[row[name]] for name, names in self.labels.items() if isinstance(row.get(name), int)}
        return self.captions.texts({**row, **named})

    def size(self, row: Row) -> tuple[int, int]:
        """Return width and height in pixels from the columns, 0 where they do not say."""
        if self.sizes is None:
            return 0, 0
        width, height = (value_of(row, name) for name in self.sizes)
        known = all(isinstance(value, int | float) and value > 0 for value in (width, height))
        return (int(width), int(height)) if known else (0, 0)


def _is_label(feature: object) -> bool:
    from datasets import ClassLabel

    return isinstance(feature, ClassLabel)


def _names(features: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield column names, with dots into nested ones; images are not searched."""
    for name, feature in features.items():
        yield f"{prefix}{name}"
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, Mapping) and not _holds_image(inner):
            yield from _names(inner, f"{prefix}{name}.")


def _holds_image(feature: object) -> bool:
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, Mapping) and "bytes" in feature)


def _image_column(config: Any, columns: Columns, features: Mapping[str, Any]) -> str:
    found = [name for name, feature in features.items() if _holds_image(feature)]
    if config.image_column is None and "image" not in features and len(found) != 1:
        known = f"its columns of images are {', '.join(map(repr, found))}" if found else "no column holds images"
        there = ", ".join(map(repr, features))
        problem = f"the dataset has no column 'image', and {known}; it has {there}"
        raise BadValue("image_column", None, problem, "name one of them as image_column")
    name = config.image_column or ("image" if "image" in features else found[0])
    return columns.wanted("image_column", [name])[0]
