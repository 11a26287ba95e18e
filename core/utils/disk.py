"""Room on disks, and what it means when a file cannot be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from ..errors import DistillError, UserError, described
from .memory import gigabytes

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors that say that there is no room: on the disk, within the quota, or below the largest allowed size of a file."""
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR}
"""Errors that say that a place cannot be written to as it is."""
_NUMBER = re.compile(r"os error (\d+)")
GO_ON = "start the run again with resume_from_checkpoint=latest, and it goes on where it was"


class DiskFull(DistillError):
    """There is no room for a file (exit code 1).

    Args:
        place: The file or folder that was to be written.
        reason: What the system said, or what was found beforehand.
        needed_bytes: Room that is needed, where that is known.
        remedy: How to go on once there is room.
    """

    def __init__(self, place: Path | str, reason: str, *, needed_bytes: int | None = None, remedy: str = GO_ON) -> None:
        needed = f" ({gigabytes(needed_bytes)} needed)" if needed_bytes is not None else ""
        super().__init__(
            f"{place} cannot be written: {reason}{needed}; {_room(Path(place))}\n"
            f"  Nothing that was complete is lost. Free some room, then {remedy}."
        )


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write where `path` is, or will be."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that is there."""
    return next((each for each in (path.absolute(), *path.absolute().parents) if each.exists()), Path(path.anchor))


def _room(path: Path) -> str:
    place = existing(path)
    try:
        return f"{gigabytes(shutil.disk_usage(place).free)} are free on the disk of {place}"
    except OSError as error:
        return f"the disk of {place} does not answer ({error.strerror})"


def error_number(error: BaseException) -> int | None:
    """Return the system's number of an error, also where a library passes it on in its text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBER.search(described(error))  # as safetensors and other libraries written in Rust put it
    return int(found[1]) if found else None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def is_disk_full(error: BaseException) -> bool:
    """Return True if `error`, or what it came from, says that there was no room for a file."""
    return any(isinstance(each, DiskFull) or error_number(each) in FULL for each in chain(error))


def explained(error: BaseException, *, place: Path, running: bool = False, remedy: str = GO_ON) -> DistillError | None:
    """Return an error for people where the system refused to write a file; None for any other error.

    Args:
        error: Whatever was raised.
        place: What was being written, where the error names no file.
        running: Whether the place could be written to before, so that no setting is at fault.
        remedy: How to go on once there is room.
    """
    for each in chain(error):
        if isinstance(each, DistillError):
            return None
        number = error_number(each)
        named = getattr(each, "filename", None)
        file = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else place
        if number in FULL:
            return DiskFull(file, os.strerror(number), remedy=remedy)
        if number in (errno.EROFS, errno.ENAMETOOLONG) or (number in UNWRITABLE and named is not None):
            return _refused(file, os.strerror(number), running=running, remedy=remedy)
    return None


def _refused(file: Path, reason: str, *, running: bool, remedy: str) -> DistillError:
    if running:
        return DistillError(f"{file} cannot be written any more: {reason}\n  Mend that, then {remedy}.")
    return UserError(
        f"{file}: {reason}",
        "use a folder that you may read and write (for a run: --output-dir DIR), or give yourself the right",
    )


def require_writable(folder: Path, *, name: str, remedy: str, make: bool = True) -> None:
    """Write a file in a folder and remove it again.

    Args:
        folder: The folder.
        name: What it is, for the message: the key that names it.
        remedy: What to do where that cannot be done.
        make: Whether the folder is made where it is not there; else the one above it is tried.

    Raises:
        UserError: The system refuses it; the message says why.
        DiskFull: There is no room for a file.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        probe = existing(folder) / f".{uuid4().hex[:12]}.probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(folder, os.strerror(error.errno or 0)) from error
        raise UserError(f"{name} = {folder} cannot be written to: {error.strerror}", remedy) from error
