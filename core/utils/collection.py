"""The collector of reference cycles, which finds nothing while modules are imported, and slows that by a quarter."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_paused = False


@contextmanager
def collection_paused() -> Iterator[None]:
    """Collect no cycles inside the block, or until :func:`resume_collection`; where they are not anyway, do nothing."""
    global _paused
    if gc.isenabled():
        gc.disable()
        _paused = True
    try:
        yield
    finally:
        resume_collection()


def resume_collection(*, for_good: bool = False) -> None:
    """Collect cycles again, if they were not because of :func:`collection_paused`.

    Args:
        for_good: Never look through what was made by now: the process keeps it to its end. Else it counts as old.
    """
    global _paused
    if not _paused:
        return
    if not gc.get_freeze_count():  # of a caller that froze its own objects none is thawed
        gc.freeze()
        if not for_good:
            gc.unfreeze()
    gc.enable()
    _paused = False
