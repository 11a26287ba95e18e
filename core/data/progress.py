"""How long work tells of itself: a bar in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

logger = logging.getLogger(__name__)
Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""``with progress("latents of 'cats'", 1200) as advance: advance(4)``."""

LINE_EVERY_SECONDS = 10.0
BAR_AFTER = 32
"""Work of fewer items shows no bar."""


def default_progress() -> Progress:
    """A rich bar on a terminal's stderr; logged lines elsewhere."""
    return bars if sys.stderr.isatty() else lines


@contextmanager
def bars(title: str, total: int) -> Iterator[Advance]:
    """A bar with the remaining time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True, disable=total < BAR_AFTER) as display:
        task = display.add_task(title, total=total)
        yield lambda count: display.advance(task, count)


@contextmanager
def lines(title: str, total: int) -> Iterator[Advance]:
    """A line every ten seconds; nothing for work that is done sooner."""
    done, start = 0, time.monotonic()
    said = start

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= LINE_EVERY_SECONDS:
            said = now
            remaining = (now - start) / done * (total - done) if done else 0.0
            logger.info(f"{title}: {done:,} of {total:,}, about {remaining:.0f} s left")

    yield advance
