"""Bar charts by matplotlib: panels with titles, named axes and counts, side by side in one image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from PIL.Image import Image

WIDTH, HEIGHT, HEAD, MARGIN = 620, 340, 64, 16
"""Pixels of a panel, of the room for the title above all of them, and around them."""
POINTS_PER_INCH = 72
"""The resolution at which matplotlib's points, of text and of lines, are pixels."""
BAR, REST, RULE, INK, FAINT = "#3a6ea5", "#e9963e", "#dedee3", "#1c1c20", "#70707a"
MOST_COUNTED = 17
"""Bars of a panel that have room for their counts above them."""
FULL = 6
"""Bars from which on they fill the width of a panel; fewer are as wide as these."""
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC", "Arial Unicode MS")
"""Matplotlib's own, then fonts for the letters that it lacks, where the machine has them; else these are boxes."""


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
    """Draw the panels in two columns below a title."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width, height = columns * WIDTH + 2 * MARGIN, HEAD + rows * HEIGHT + MARGIN
    figure = Figure((width / POINTS_PER_INCH, height / POINTS_PER_INCH), POINTS_PER_INCH, facecolor="white")
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - HEAD / height), w_pad=0.15, h_pad=0.15)
    canvas = FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, 1):
        bars(figure.add_subplot(rows, columns, number), panel)
    left = MARGIN / width
    head = figure.text(left, 1 - 12 / height, title, size=20, color=INK, va="top")
    below = figure.text(left, 1 - 42 / height, subtitle, size=12, color=FAINT, va="top")
    _set_fonts(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        _shorten(head, width - 2 * MARGIN)
        _shorten(below, width - 2 * MARGIN)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def bars(axes: Axes, panel: Panel) -> None:
    """Draw the panel on its axes."""
    from matplotlib.ticker import MaxNLocator

    totals = [sum(parts) for parts in zip(panel.values, panel.rest, strict=True)] if panel.rest else panel.values
    positions, width = range(len(totals)), 0.76 * min(1, len(totals) / FULL)
    top = axes.bar(positions, panel.values, width, color=BAR, label=panel.legend[0])
    if panel.rest:
        top = axes.bar(positions, panel.rest, width, panel.values, color=REST, label=panel.legend[1])
        look = {"frameon": False, "fontsize": 11, "labelcolor": FAINT, "handlelength": 1}
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, **look)
    if len(totals) <= MOST_COUNTED:
        axes.bar_label(top, [short_number(total) for total in totals], padding=2, size=11, color=INK)
    axes.set_facecolor("white")
    axes.set_title(panel.title, loc="left", size=14, color=INK, pad=12)
    axes.set_xlabel(panel.axis, size=12, color=FAINT)
    axes.set_ylabel(panel.counted, size=12, color=FAINT)
    axes.set_xticks(positions, panel.labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, max(len(totals), 1) - 0.5)
    axes.set_ylim(0, 1.08 * (max(totals, default=0) or 1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.tick_params(length=0, labelsize=11, labelcolor=FAINT)
    axes.grid(axis="y", color=RULE)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)


def _set_fonts(figure: Figure) -> None:
    """Let text stand as it is, whatever its letters and its dollar signs."""
    from matplotlib.font_manager import get_font_names
    from matplotlib.text import Text

    there = set(get_font_names())
    for text in figure.findobj(Text):
        text.set_fontfamily([name for name in FONTS if name in there])
        text.set_parse_math(False)


def _shorten(text: Text, width: float) -> None:
    """Cut the text with an ellipsis where it is wider than so many pixels."""
    while (wide := text.get_window_extent().width) > width:
        letters = text.get_text()
        text.set_text(letters[: int(len(letters) * width / wide) - 1] + "…")


def short_number(value: float) -> str:
    """Return ``950``, ``12.5k``, ``3M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
