"""Model files: safetensors headers, content hashes; and quiet loading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import UserError

LFS_POINTER = b"version https://git-lfs"
"""What a file begins with that Git has put in the place of a large one."""
WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole."""
CHUNKS, CHUNK_BYTES = 1024, 64 * 2**10
"""Number and bytes of the evenly spaced pieces hashed of larger files: any change longer than size / 1024 is seen."""


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and import-time advice of diffusers and transformers inside the block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


def read_header(path: Path) -> dict[str, Any]:
    """Read the JSON header of a safetensors file. Raises UserError when the file is none or is cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks all of the header: lengths, types, and that no bytes are left
            pass
    except (SafetensorError, OSError) as error:
        _raise_for(path, error)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def _raise_for(path: Path, error: Exception) -> NoReturn:
    """Raise UserError for a file that the library refuses."""
    if "incomplete metadata" in str(error):
        found = f"is cut short, or goes on behind its end: {path.stat().st_size} bytes"
        raise UserError(f"{path} {found} ({error})", "download it again") from error
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a pointer of Git LFS, not the weights", "fetch them: git lfs pull") from error
    raise UserError(f"{path} is not a safetensors file ({error})", "download it again") from error


def hash_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the contents in order, of large files by 1,024 evenly spaced pieces."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            for piece in range(CHUNKS):
                file.seek(piece * (size - CHUNK_BYTES) // (CHUNKS - 1))
                digest.update(file.read(CHUNK_BYTES))
    return digest.hexdigest()
