"""Bar charts without a plotting library: panels with titles, named axes and counts, side by side in one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .grid import BACKGROUND, FAINT, INK, MARGIN, font, line_height, shorten

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

WIDTH, HEIGHT = 620, 340
LEFT, RIGHT, TOP, BOTTOM = 74, 16, 40, 82
"""Room around the bars: counts, nothing, the title, labels and the name of the axis."""
BAR, REST, RULE = (58, 110, 165), (233, 150, 62), (222, 222, 227)
LABEL_ANGLE = 40


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: Above it.
        axis: Name and unit of what the labels say.
        labels: Below the bars.
        values: Heights of the bars.
        rest: Stacked on them in another colour, as long as `values`; or nothing.
        legend: Names of the two colours where there is a rest.
        counted: Name of what the bars count.
    """

    title: str
    axis: str
    labels: Sequence[str]
    values: Sequence[float]
    counted: str
    rest: Sequence[float] = ()
    legend: tuple[str, str] = ("", "")


def draw(panels: Sequence[Panel], *, title: str, subtitle: str) -> Image:
    """The panels in two columns below a title."""
    from PIL import Image, ImageDraw

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    head = 64
    sheet = Image.new("RGB", (columns * WIDTH + 2 * MARGIN, head + rows * HEIGHT + MARGIN), BACKGROUND)
    pen, room = ImageDraw.Draw(sheet), columns * WIDTH
    pen.text((MARGIN, 12), shorten(title, font(22), room), INK, font(22))
    pen.text((MARGIN, 42), shorten(subtitle, font(13), room), FAINT, font(13))
    for number, panel in enumerate(panels):
        place = (MARGIN + number % columns * WIDTH, head + number // columns * HEIGHT)
        _panel(sheet, pen, panel, *place)
    return sheet


def _panel(sheet: Image, pen: ImageDraw, panel: Panel, left: int, top: int) -> None:
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, top + TOP, top + HEIGHT - BOTTOM
    pen.text((x0, top + 12), shorten(panel.title, font(15), x1 - x0), INK, font(15))
    totals = [sum(pair) for pair in zip(panel.values, panel.rest or [0] * len(panel.values), strict=True)]
    step = nice_step(max(totals, default=0) or 1)
    highest = step * -(-max(totals, default=1) // step) or step
    for number in range(round(highest / step) + 1):
        y = y1 - round(number * step / highest * (y1 - y0))
        pen.line((x0, y, x1, y), RULE)
        pen.text((x0 - 8, y), short_number(number * step), FAINT, font(11), anchor="rm")
    _upright(sheet, panel.counted, left + 6, (y0 + y1) // 2)
    pitch = (x1 - x0) / max(1, len(panel.values))
    for number, (value, total) in enumerate(zip(panel.values, totals, strict=True)):
        middle, half = x0 + (number + 0.5) * pitch, max(1.0, 0.38 * min(pitch, 90))
        levels = [y1 - round(part / highest * (y1 - y0)) for part in (value, total)]
        pen.rectangle((middle - half, levels[0], middle + half, y1), BAR)
        if total > value:
            pen.rectangle((middle - half, levels[1], middle + half, levels[0]), REST)
        if pitch > 30:
            pen.text((middle, levels[1] - 3), short_number(total), INK, font(11), anchor="mb")
        _slanted(sheet, panel.labels[number], round(middle), y1 + 4)
    pen.line((x0, y1, x1, y1), INK)
    pen.text(((x0 + x1) // 2, top + HEIGHT - 12), panel.axis, FAINT, font(12), anchor="mb")
    if panel.rest:
        _legend(pen, panel.legend, x1, top + 12)


def _legend(pen: ImageDraw, names: tuple[str, str], right: int, y: int) -> None:
    for colour, name in ((REST, names[1]), (BAR, names[0])):
        width = round(font(11).getlength(name))
        pen.text((right - width, y), name, FAINT, font(11))
        pen.rectangle((right - width - 14, y + 2, right - width - 5, y + 11), colour)
        right -= width + 26


def _text(text: str, size: int) -> Image:
    from PIL import Image, ImageDraw

    chosen = font(size)
    image = Image.new("L", (round(chosen.getlength(text)) + 2, line_height(chosen) + 2), 0)
    ImageDraw.Draw(image).text((1, 0), text, 255, chosen)
    return image


def _stamp(sheet: Image, mask: Image, place: tuple[int, int]) -> None:
    from PIL import Image

    sheet.paste(Image.new("RGB", mask.size, FAINT), place, mask)


def _slanted(sheet: Image, label: str, right: int, top: int) -> None:
    """A label that ends below its bar."""
    from PIL import Image

    mask = _text(label, 11).rotate(LABEL_ANGLE, Image.Resampling.BICUBIC, expand=True)
    _stamp(sheet, mask, (right - mask.width + 8, top))


def _upright(sheet: Image, label: str, left: int, middle: int) -> None:
    from PIL import Image

    mask = _text(label, 12).transpose(Image.Transpose.ROTATE_90)
    _stamp(sheet, mask, (left, middle - mask.height // 2))


def nice_step(highest: float) -> float:
    """Distance of the lines of an axis up to `highest`: four or so, at 1, 2 or 5 times a power of ten."""
    step = 1.0
    while step * 5 < highest:
        for factor in (2, 2.5, 2):
            if step * 5 >= highest:
                break
            step *= factor
    return step


def short_number(value: float) -> str:
    """``950``, ``12.5k``, ``3M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
