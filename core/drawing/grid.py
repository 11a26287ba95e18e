"""Labelled grids of images: rows are prompts, columns are who made the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont
    from torch import Tensor

SMALLEST_CELL = 128
LARGEST_CELL = 512
GAP = 6
MARGIN = 16
BACKGROUND, INK, FAINT, EMPTY = (255, 255, 255), (28, 28, 32), (112, 112, 122), (238, 238, 241)


@dataclass(frozen=True)
class GridRow:
    """One row: its label, a smaller second line, and an image (or None) for each column."""

    label: str
    images: Sequence[Image | None]
    detail: str = ""


def labelled_grid(
    rows: Sequence[GridRow],
    columns: Sequence[str],
    *,
    title: str = "",
    footer: str = "",
    largest_cell: int = LARGEST_CELL,
) -> Image:
    """Draw the grid as one RGB image.

    Images whose longer edge is below 128 px are enlarged by a whole factor (nearest neighbour, so that pixels stay
    pixels); those above `largest_cell` px are scaled down.

    Args:
        rows: At least one row, each with one image or None per column.
        columns: Headers; a line break starts a fainter second line (its number of steps, its guidance).
        title: Line above the grid.
        footer: Line below it.
        largest_cell: Longest edge of an image in the grid, in pixels.

    Raises:
        ValueError: A row has another number of images than there are columns.
    """
    for row in rows:
        if len(row.images) != len(columns):
            raise ValueError(f"row {row.label!r} has {len(row.images)} images for {len(columns)} columns")
    cells = [[None if image is None else fit(image, largest=largest_cell) for image in row.images] for row in rows]
    return _Layout(rows, columns, cells, title, footer).draw()


def fit(image: Image, *, largest: int = LARGEST_CELL) -> Image:
    """The image as RGB at a size that can be looked at."""
    from PIL import Image

    image = image.convert("RGB")
    longer = max(image.size)
    if longer < SMALLEST_CELL:
        factor = -(-SMALLEST_CELL // longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longer > largest:
        size = [max(1, round(edge * largest / longer)) for edge in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    return image


def to_images(images: Tensor) -> list[Image]:
    """Images of a tensor of shape (N, 3, H, W) in [0, 1]."""
    from PIL import Image

    pixels = images.detach().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def to_tensor(images: Sequence[Image]) -> Tensor:
    """Shape (N, 3, H, W), float32 in [0, 1], of images of one size."""
    import numpy as np
    import torch

    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)


class _Layout:
    """Measures, then draws."""

    def __init__(
        self,
        rows: Sequence[GridRow],
        columns: Sequence[str],
        cells: Sequence[Sequence[Image | None]],
        title: str,
        footer: str,
    ) -> None:
        self.rows, self.cells, self.title, self.footer = rows, cells, title, footer
        every = [cell for row in cells for cell in row if cell is not None]
        empty = max((cell.width for cell in every), default=SMALLEST_CELL)
        self.widths = [
            max((row[index].width for row in cells if row[index] is not None), default=empty)  # pyright: ignore[reportOptionalMemberAccess]
            for index in range(len(columns))
        ]
        self.heights = [max((cell.height for cell in row if cell is not None), default=SMALLEST_CELL) for row in cells]
        scale = 1.0 if max(self.widths) < 256 else 1.35
        self.font, self.small, self.large = (font(round(size * scale)) for size in (14, 12, 18))
        self.label_width = round(150 * scale) + (50 if max(self.widths) >= 256 else 0)
        headers = [column.partition("\n") for column in columns]
        self.heads = [
            [
                *((line, self.font, INK) for line in wrap(head, self.font, width)),
                *((line, self.small, FAINT) for line in wrap(detail, self.small, width)),
            ]
            for (head, _, detail), width in zip(headers, self.widths, strict=True)
        ]

    def draw(self) -> Image:
        from PIL import Image, ImageDraw

        head_height = max(sum(line_height(font) for _, font, _ in head) for head in self.heads) + GAP
        title_height = line_height(self.large) + GAP if self.title else 0
        width = 2 * MARGIN + self.label_width + sum(self.widths) + GAP * len(self.widths)
        footer = wrap(self.footer, self.small, width - 2 * MARGIN)
        height = 2 * MARGIN + title_height + head_height + sum(self.heights) + GAP * (len(self.heights) - 1)
        height += (GAP + line_height(self.small) * len(footer)) if footer else 0
        sheet = Image.new("RGB", (width, height), BACKGROUND)
        pen = ImageDraw.Draw(sheet)
        if self.title:
            pen.text((MARGIN, MARGIN), shorten(self.title, self.large, width - 2 * MARGIN), INK, self.large)
        top = MARGIN + title_height
        self._heads(pen, top, head_height)
        top += head_height
        for row, cells, row_height in zip(self.rows, self.cells, self.heights, strict=True):
            self._row(sheet, pen, row, cells, top, row_height)
            top += row_height + GAP
        for index, line in enumerate(footer):
            pen.text((MARGIN, top + index * line_height(self.small)), line, FAINT, self.small)
        return sheet

    def _lefts(self) -> list[int]:
        left = MARGIN + self.label_width + GAP
        return [left + sum(self.widths[:index]) + GAP * index for index in range(len(self.widths))]

    def _heads(self, pen: ImageDraw, top: int, height: int) -> None:
        for left, head in zip(self._lefts(), self.heads, strict=True):
            y = top + height - GAP - sum(line_height(font) for _, font, _ in head)
            for line, font, colour in head:
                pen.text((left, y), line, colour, font)
                y += line_height(font)

    def _row(
        self, sheet: Image, pen: ImageDraw, row: GridRow, cells: Sequence[Image | None], top: int, height: int
    ) -> None:
        for left, width, cell in zip(self._lefts(), self.widths, cells, strict=True):
            if cell is None:
                pen.rectangle((left, top, left + width - 1, top + height - 1), EMPTY)
            else:
                sheet.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
        detail = wrap(row.detail, self.small, self.label_width)
        room = (height - len(detail) * line_height(self.small)) // line_height(self.font)
        label = wrap(row.label, self.font, self.label_width)
        if len(label) > room:
            label = label[: max(room, 1)]
            label[-1] = shorten(label[-1] + " …", self.font, self.label_width)
        y = top
        for line, font, colour in [*((x, self.font, INK) for x in label), *((x, self.small, FAINT) for x in detail)]:
            pen.text((MARGIN, y), line, colour, font)
            y += line_height(font)


def wrap(text: str, font: FreeTypeFont | ImageFont, width: int) -> list[str]:
    """Lines of `text` that are at most `width` pixels wide; a word that is longer is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(shorten(word, font, width))
    return lines


def shorten(text: str, font: FreeTypeFont | ImageFont, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def font(size: int) -> FreeTypeFont | ImageFont:
    """Pillow's own, at `size` pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def line_height(font: FreeTypeFont | ImageFont) -> int:
    """Pixels from one line to the next."""
    return round(1.3 * getattr(font, "size", 11))
