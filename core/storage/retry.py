"""One policy for everything remote: how often, how long apart, and what is said when it was in vain."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import OutOfReach

T = TypeVar("T")


class Transient(Exception):
    """An attempt failed in a way that another may not: no connection, 5xx, a body cut short.

    Args:
        reason: For people; never holds credentials.
        after_seconds: What the server asked to wait (``Retry-After``), if it did.
    """

    def __init__(self, reason: str, *, after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.after_seconds = reason, after_seconds


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter.

    Between two attempts lies half of ``base_seconds * 2 ** n`` (at most ``max_seconds``) and a random part of the
    other half, so that many clients do not come back at the same moment. A server's ``Retry-After`` is waited for up to
    ``max_seconds``. With the defaults an outage of one to two minutes is ridden out.
    """

    attempts: int = 12
    """How often a request is tried in all."""
    base_seconds: float = 0.25
    """The first wait."""
    max_seconds: float = 30.0
    """The longest wait."""
    jitter: float = 0.5
    """Random share of each wait (0-1)."""
    timeout_seconds: float = 60.0
    """How long the server may be silent in the middle of a request."""
    connect_seconds: float = 10.0
    """How long a connection may take."""
    sleep: Callable[[float], None] = time.sleep
    """Waits; tests put a recorder here."""
    draw: Callable[[], float] = random.random
    """A number in [0, 1)."""

    def run(self, place: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, called again while it raises :class:`Transient`.

        Args:
            place: What is read or written, for the message.
            attempt: One request.

        Raises:
            OutOfReach: The last attempt failed too.
        """
        started, failure = time.monotonic(), Transient("not tried")
        for number in range(self.attempts):
            try:
                return attempt()
            except Transient as error:
                failure = error
                if number + 1 < self.attempts:
                    self.sleep(self.delay(number, error.after_seconds))
        seconds = time.monotonic() - started
        tried = f"tried {self.attempts} times in {seconds:.0f} s" if self.attempts > 1 else "tried once"
        raise OutOfReach(place, f"{failure.reason} ({tried})") from failure

    def delay(self, number: int, after_seconds: float = 0.0) -> float:
        """Seconds to wait after attempt `number` (from 0)."""
        full = min(self.max_seconds, self.base_seconds * 2**number)
        drawn = full * (1 - self.jitter * self.draw())
        return max(drawn, min(after_seconds, self.max_seconds))
