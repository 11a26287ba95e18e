"""The header of a safetensors file: its library writes the metadata in another order each time."""

from __future__ import annotations

import json
import struct
from pathlib import Path

ALIGNMENT = 8
"""Bytes that the length of a header is a multiple of."""


def sort_metadata(file: Path) -> None:
    """Bring the metadata of a safetensors file into alphabetical order, so that the same content is the same file."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        written = stream.read(length)
        header = json.loads(written)
        if "__metadata__" not in header:
            return
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        if len(text) == length:
            stream.seek(8)
            stream.write(text)
            return
        data = stream.read()
        stream.seek(0)
        stream.write(struct.pack("<Q", len(text)) + text + data)
        stream.truncate()
