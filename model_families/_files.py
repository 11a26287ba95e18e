"""Model files: safetensors headers, content hashes; and quiet loading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError

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
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = file.read(length) if length <= size - 8 else b""
    try:
        header = json.loads(text)
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file", "download it again") from error
    if 8 + length + end != size:
        raise UserError(f"{path} is cut short: {size} bytes of {8 + length + end}", "download it again")
    return header


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
