"""Ctrl-C and SIGTERM: during training they let the step finish and save, elsewhere they end the run at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from ..errors import Interrupted


class StopRequest:
    """A context in which SIGINT and SIGTERM end the run in an orderly way.

    Inside :meth:`deferred` they set :attr:`requested`, and a second Ctrl-C ends the process at once; outside of it they
    raise :class:`Interrupted` immediately (caches are kept and continued, a trained run has its checkpoint).
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Turn a signal inside the block into a request that the block checks by itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            raise Interrupted(f"stopped by {signal.Signals(number).name}")
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
