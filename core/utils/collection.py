"""The collector of reference cycles, which finds nothing while modules are imported, and slows that by a quarter."""

from __future__ import annotations

import gc

_paused = False


def pause_collection() -> None:
    """Collect no cycles until :func:`resume_collection`; nothing, where the collector is off already."""
    global _paused
    if gc.isenabled():
        gc.disable()
        _paused = True


def resume_collection(*, for_good: bool = False) -> None:
    """Collect cycles again, if they were not because of :func:`pause_collection`.

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
