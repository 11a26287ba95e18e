"""Files that are written completely or not at all, and what is read with a reason where it cannot be."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

from ..errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

PARTIAL = ".partial-"
STALE_SECONDS = 24 * 3600
"""Age at which leftovers of killed writers are removed; younger ones may belong to a running one."""


def path_problem(path: Path | str) -> str | None:
    """Return why no file or folder can have this path; None where one may, there or not.

    Pipes and devices are neither: reading them may have no end.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"cannot be used as a path: {(error.strerror or str(error)).lower()}"
    except ValueError:
        return "cannot be used as a path: it holds characters that no file name has"
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "is a pipe or a device, not a file or folder"


def file_problem(path: Path | str) -> str | None:
    """Return why a path is not a file that can be opened; None where it is one."""
    problem = path_problem(path)
    if problem is not None or os.path.isfile(path):
        return problem
    return "is a folder" if os.path.isdir(path) else "does not exist"


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Write what the system still holds of a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Return the checksum of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_of(path: Path) -> Path:
    """Return the path at which `path` is written before it is renamed; no other process writes there."""
    return path.with_name(f"{PARTIAL}{uuid4().hex[:12]}-{path.name}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the file to write in place of `path`, whose folder is made; after the block it is moved there.

    No reader and no crash ever sees a part of `path`, and a block that fails leaves it as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give the folder to write in place of `path`, whose parent is made; after the block it is moved there.

    No reader sees a part of `path`, and a block that fails leaves it as it was, and no half of a folder beside it.
    """
    partial, replaced = (path.with_name(f".{path.name}.{state}") for state in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not to be kept full by half a folder
        raise
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write `path`, whose folder is made, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text completely or not at all; its folder is made."""
    write_whole(path, text.encode("utf-8"))


def save_image(image: Image, path: Path) -> None:
    """Write a PNG completely or not at all; its folder is made."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    write_whole(path, stream.getvalue())


def append_line(path: Path, line: str) -> None:
    """Append one line; a crash leaves at most a torn last line, which readers skip and the next line does not join."""
    with path.open("ab+", buffering=0) as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else f"\n{line}"
        append_whole(stream, line.encode() + b"\n")
        os.fsync(stream.fileno())


def append_whole(stream: io.RawIOBase | IO[bytes], data: bytes) -> None:
    """Append to an unbuffered file opened for appending; where the system refuses, the file is left as it was."""
    length = stream.seek(0, os.SEEK_END)
    try:
        left = memoryview(data)
        while left:
            left = left[stream.write(left) or 0 :]
    except OSError:
        stream.truncate(length)
        raise


def is_stale(path: Path) -> bool:
    """Return True if a leftover is so old that its writer must be gone."""
    try:
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return False


def read_json_object(file: Path, *, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        file: The file.
        remedy: What to do about a damaged one.

    Raises:
        UserError: It is not JSON, or no object.
        OSError: It cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}", remedy) from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object", remedy)
    return found
