"""Threads that end when the work does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose waiting tasks are dropped when the block ends.

    Without that an error would be raised only after all of them had their turn: with a server that is gone, each of
    thousands its minutes of retries.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
