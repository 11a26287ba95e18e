"""The progress display of a run: a bar in a terminal, plain lines elsewhere, and the estimated end."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)
Advance = Callable[[int], None]
TaskProgress = Callable[[str, int], AbstractContextManager[Advance]]
"""``with progress("latents of 'cats'", 1200) as advance: advance(4)``."""

LINE_EVERY_SECONDS = 10.0
SAID_AFTER_SECONDS = 3.0
SAID_AGAIN_SECONDS = 30.0
"""Seconds after which a piece of work that shows no progress says what it is, first and again."""
BAR_AFTER = 32
"""Work of fewer items shows no bar."""
FIRST_ESTIMATE = 5
"""Number of steps after which the length of the run is estimated; the first one warms up and is not counted."""


class Pace:
    """The speed of a run, without its pauses (validation, checkpoints).

    Wall clock only, read when the host has waited for the device anyway.

    Args:
        start_step: Optimizer steps taken before this process.
        clock: Seconds, monotonic.
    """

    def __init__(self, *, start_step: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._first = (start_step, clock())
        self._last = self._first
        self._paused = 0.0
        self._pause: float | None = None
        self.last_seconds_per_step: float | None = None
        """Seconds per step between the last two marks with steps between them."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside the block out of the training time, also for marks that are made inside it."""
        self._pause = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - self._pause
            self._pause = None

    def _now(self) -> float:
        return (self._clock() if self._pause is None else self._pause) - self._paused

    def mark(self, step: int) -> float | None:
        """Return seconds per step since the last mark, or None when no step was taken."""
        now = self._now()
        steps, seconds = step - self._last[0], now - self._last[1]
        self._last = (step, now)
        per_step = seconds / steps if steps > 0 else None
        self.last_seconds_per_step = per_step or self.last_seconds_per_step
        return per_step

    def restart(self, step: int) -> None:
        """Forget earlier measurements (after the first step, which compiles, allocates and fills caches)."""
        self._first = self._last = (step, self._now())

    @property
    def seconds_per_step(self) -> float | None:
        """Mean seconds per step since the start (or :meth:`restart`), up to the last mark."""
        steps = self._last[0] - self._first[0]
        return (self._last[1] - self._first[1]) / steps if steps > 0 else None

    def remaining_seconds(self, step: int, total: int | None) -> float | None:
        """Return the time from `step` to `total` at the mean pace, or None while it is not known."""
        per_step = self.seconds_per_step
        return None if per_step is None or total is None else per_step * max(total - step, 0)


class Progress:
    """Plain lines, one for each log interval. :func:`make_progress` chooses between this and the terminal's bar.

    Args:
        total_steps: Optimizer steps of the run, or None when it is not known.
        start_step: Steps taken before (a resumed run).
        samples_per_step: Samples of one optimizer step, over all processes; the mean where datasets differ.
        stream: The stream that the lines are written to.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        start_step: int = 0,
        samples_per_step: float,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps = total_steps
        self.samples_per_step = samples_per_step
        self.stream = stream if stream is not None else sys.stderr
        self.pace = Pace(start_step=start_step, clock=clock)
        self._start_step = start_step
        self._estimated = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Note that `step` optimizer steps are taken, without waiting for the device."""
        if step == self._start_step + 1:
            self.pace.restart(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show metrics that were read from the device after `step` steps."""
        self.pace.mark(step)
        self._estimate(step)
        self.show(self.line(step, metrics))

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """Return one line of a log."""
        parts = [f"step {step}" + (f"/{self.total_steps}" if self.total_steps else "")]
        parts += [f"{name} {metrics[name]:.4g}" for name in ("loss", "lr", "grad_norm") if name in metrics]
        per_step = self.pace.last_seconds_per_step
        if per_step:
            parts.append(f"{self.samples_per_step / per_step:.3g} samples/s")
        remaining = self.pace.remaining_seconds(step, self.total_steps)
        if remaining is not None:
            parts.append(f"{duration(remaining)} left")
        return ", ".join(parts)

    def show(self, text: str) -> None:
        """Print a line for people."""
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """End the display when the run is over."""

    def _estimate(self, step: int) -> None:
        remaining = self.pace.remaining_seconds(step, self.total_steps)
        if self._estimated or not remaining or step - self._start_step < FIRST_ESTIMATE:
            return
        self._estimated = True
        self.show(
            f"at {self.pace.seconds_per_step:.3g} s per step the remaining {(self.total_steps or step) - step} steps "
            f"take about {duration(remaining)}, validation not counted"
        )


class TerminalProgress(Progress):
    """A live bar by rich; printed lines scroll above it."""

    _bar: RichProgress | None = None

    def __enter__(self) -> Self:
        from rich import progress
        from rich.console import Console

        figures = progress.TextColumn("{task.fields[figures]}")
        columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn(), figures)
        self._bar = progress.Progress(*columns, console=Console(file=self.stream))
        self._task = self._bar.add_task("distill", total=self.total_steps, completed=self._start_step, figures="")
        self._bar.start()
        return self

    def advance(self, step: int) -> None:
        """Move the bar."""
        super().advance(step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Update the metrics beside the bar."""
        self.pace.mark(step)
        self._estimate(step)
        if self._bar is not None:
            self._bar.update(self._task, figures=self.line(step, metrics).split(", ", 1)[-1])

    def show(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            super().show(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_progress(
    total_steps: int | None,
    *,
    start_step: int = 0,
    samples_per_step: float,
    stream: IO[str] | None = None,
) -> Progress:
    """Return a bar where `stream` (stderr unless given) is a terminal, plain lines elsewhere."""
    output: IO[str] = sys.stderr if stream is None else stream
    kind = TerminalProgress if output.isatty() else Progress
    return kind(total_steps, start_step=start_step, samples_per_step=samples_per_step, stream=output)


def default_progress() -> TaskProgress:
    """Return a bar on a terminal's stderr; logged lines elsewhere."""
    return bars if sys.stderr.isatty() else lines


@contextmanager
def bars(title: str, total: int) -> Iterator[Advance]:
    """Show a bar with the remaining time."""
    from rich import progress
    from rich.console import Console

    text, left = progress.TextColumn("{task.description}"), progress.TimeRemainingColumn()
    columns, console = (text, progress.BarColumn(), progress.MofNCompleteColumn(), left), Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, disable=total < BAR_AFTER) as display:
        task = display.add_task(title, total=total)
        yield lambda count: display.advance(task, count)


@contextmanager
def lines(title: str, total: int) -> Iterator[Advance]:
    """Log a line every ten seconds; nothing for work that is done sooner."""
    done, pace = 0, Pace(clock=time.monotonic)
    said = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        if time.monotonic() - said >= LINE_EVERY_SECONDS:
            said = time.monotonic()
            pace.mark(done)
            logger.info(
                f"{title}: {done:,} of {total:,}, about {pace.remaining_seconds(done, total) or 0.0:.0f} s left"
            )

    yield advance


@contextmanager
def working(what: str) -> Iterator[None]:
    """Log what the block does once that has taken a few seconds, then now and then, and in the end how long it took.

    Args:
        what: What is being loaded or made, as ``loading the teacher``.
    """
    began, ended = time.monotonic(), threading.Event()
    said = False

    def tell() -> None:
        nonlocal said
        wait = SAID_AFTER_SECONDS
        while not ended.wait(wait):
            passed = time.monotonic() - began
            logger.info(f"{what}, for {duration(passed)} so far" if said else f"{what} ...")
            said, wait = True, SAID_AGAIN_SECONDS

    teller = threading.Thread(target=tell, name=what, daemon=True)
    teller.start()
    try:
        yield
        if said:
            logger.info(f"{what}: done in {duration(time.monotonic() - began)}")
    finally:
        ended.set()
        teller.join()


def duration(seconds: float) -> str:
    """Return seconds as ``45 s``, ``12 min``, ``3 h 20 min`` or ``2 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
