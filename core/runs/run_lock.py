"""One run at a time in an output folder: the second is refused, and says who is at it."""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import UserError
from ..utils.locks import SILENT_SECONDS, FolderInUse, FolderLock

logger = logging.getLogger(__name__)
NAME = "run"


def lock_folder(folder: Path) -> FolderLock:
    """Lock an existing output folder, until the lock is released or the process ends.

    Raises:
        UserError: Another run is at it.
    """
    lock = FolderLock(folder, name=NAME)
    try:
        left = lock.acquire()
    except FolderInUse as error:
        raise in_use(folder, error) from error
    if left is not None:
        logger.info(f"the lock on {folder} was left by {left}, which is gone: it is taken over")
    return lock


def in_use(folder: Path, error: FolderInUse) -> UserError:
    """Return the refusal of a folder that another run is at."""
    who, silent = error.holder or "a process that has just begun", error.silent_seconds
    heard = ""
    if silent is not None:
        heard = (
            f" (last heard of {max(silent, 0):.0f} s ago; if that machine is gone, try again in "
            f"{SILENT_SECONDS - silent:.0f} s)"
        )
    return UserError(
        f"output_dir = {folder} is in use by another run: {who}{heard}",
        "wait for it to end, or stop it; or choose another folder: --output-dir DIR",
    )


def refuse_while_running(folder: Path) -> None:
    """Raise UserError while a run is at work in `folder`."""
    found = _at_work(folder)
    if found is not None:
        raise in_use(folder, found) from found


def note_while_running(folder: Path) -> None:
    """Warn while a run is at work in `folder`: its student is about to be replaced."""
    found = _at_work(folder)
    if found is not None:
        logger.warning(f"{folder} is in use by a run ({found.holder}): this is the student that it has yet to replace")


def _at_work(folder: Path) -> FolderInUse | None:
    try:
        FolderLock(folder, name=NAME).in_use()
    except FolderInUse as error:
        return error
    except OSError:
        return None  # a folder that cannot be written to is in nobody's use
    return None
