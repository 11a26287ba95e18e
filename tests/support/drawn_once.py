"""Charts of equal panels, drawn once in a process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.core.drawing.charts import Panel
    from PIL.Image import Image


def drawn_once(draw: Callable[..., Image]) -> Callable[..., Image]:
    """Return `draw` with a memory for charts of the same panels and title.

    Their subtitles name the folder, in which alone the runs of two tests differ: the later ones get the earliest's.
    """
    drawn: dict[str, Image] = {}

    def remembered(panels: Sequence[Panel], *, title: str, subtitle: str) -> Image:
        key = repr((panels, title))
        if key not in drawn:
            drawn[key] = draw(panels, title=title, subtitle=subtitle)
        return drawn[key].copy()

    return remembered
