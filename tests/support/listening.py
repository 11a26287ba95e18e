"""What the package's loggers tell people, in lines as they are printed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from distill.core.utils.console import PACKAGE, LineFormatter


class Listener(logging.Handler):
    """Keeps each line, from its making on."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self.lines: list[str] = []
        PACKAGE.addHandler(self)
        PACKAGE.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def listen() -> list[str]:
    """Lines from now on, until the test ends."""
    return Listener().lines


@contextmanager
def listening() -> Iterator[list[str]]:
    """Lines of a block."""
    listener = Listener()
    try:
        yield listener.lines
    finally:
        PACKAGE.removeHandler(listener)


def stop_listening() -> None:
    """Leave the package's logger as an import makes it."""
    for handler in [handler for handler in PACKAGE.handlers if isinstance(handler, Listener)]:
        PACKAGE.removeHandler(handler)
    if PACKAGE.level != logging.NOTSET:  # what every logger remembers of its level is forgotten with each change
        PACKAGE.setLevel(logging.NOTSET)
