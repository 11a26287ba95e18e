"""What the package's loggers tell people: lines on stderr, from one process, kept in a run's log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .redaction import redacted

PACKAGE = logging.getLogger(__name__.rsplit(".", 3)[0])
"""The parent of the loggers of all of the package's modules."""


class LineFormatter(logging.Formatter):
    """The message as it is; what is worse than information begins with its level, as ``warning: ...``."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without the traceback that may follow it."""
        return f"{record.levelname.lower()}: {record.message}" if record.levelno > logging.INFO else record.message


class Console(logging.Handler):
    """Prints each record as a line on stderr.

    It is always the stderr of the moment: a live progress bar puts itself in its place and prints lines above the bar.

    Args:
        note: Also takes each line, as the log of a run does.
    """

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Note the line and print it."""
        try:
            line = redacted(self.format(record))
            if self._note is not None:
                self._note(line)
            print(line, file=sys.stderr, flush=True)
        except Exception:  # logging's rule: what cannot be said is reported and ends nothing
            self.handleError(record)


@contextmanager
def console(
    *, enabled: bool = True, note: Callable[[str], None] | None = None, propagate: bool = True
) -> Iterator[None]:
    """Print what the package logs, from level INFO on, while the block lasts; within another block in its stead.

    Args:
        enabled: False in all processes but the first: one process speaks for all.
        note: Also takes each line, as the log of a run does.
        propagate: Whether handlers of the root logger see the records too; a command has its stderr to itself.
    """
    outer = [handler for handler in PACKAGE.handlers if isinstance(handler, Console)]
    own = [Console(note)] if enabled else []
    level, propagates = PACKAGE.level, PACKAGE.propagate
    _replace(outer, own)
    PACKAGE.setLevel(level or logging.INFO)
    PACKAGE.propagate = propagates and propagate
    try:
        yield
    finally:
        _replace(own, outer)
        PACKAGE.setLevel(level)
        PACKAGE.propagate = propagates


def _replace(old: Sequence[logging.Handler], new: Sequence[logging.Handler]) -> None:
    for handler in old:
        PACKAGE.removeHandler(handler)
    for handler in new:
        PACKAGE.addHandler(handler)
