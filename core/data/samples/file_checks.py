# pyright: reportAttributeAccessIssue=false
"""Checks of files by their listing alone, and names that can be shown and written down."""

from __future__ import annotations

import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from ...plugin_api.backend import Entry
from .images import EMPTY_FILE, MAX_FILE_BYTES, too_many_bytes

NO_NAME = "its name is no UTF-8: rename it"
JOINER = "\u200d"
"""The joiner inside emoji: the one character without a shape of its own that is not escaped."""


def named(entry: Entry) -> Entry:
    """Replace a key that is not UTF-8, which cannot be written to a table or a message, by one that is."""
    if not any("\ud800" <= letter <= "\udfff" for letter in entry.key):
        return entry
    key = os.fsencode(entry.key).decode("utf-8", "backslashreplace")
    return replace(entry, key=key, problem=entry.problem or NO_NAME)


def checked_images(images: pa.RecordBatch) -> pa.RecordBatch:
    """Add a problem to listed image files (columns size, problem) whose size alone makes them unusable."""
    sizes, problems = images["size"], images["problem"]
    found = pc.case_when(
        pc.make_struct(pc.not_equal(problems, ""), pc.equal(sizes, 0), pc.greater(sizes, MAX_FILE_BYTES)),
        problems, EMPTY_FILE, too_many_bytes(), "",
    )  # fmt: skip
    return images.set_column(images.schema.get_field_index("problem"), "problem", found.cast(pa.large_string()))


def printable(text: str) -> str:
    r"""Escape characters that cannot be shown (``\n``, ``\x1b``), so that a name or a reason is one line and can be
    read back.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == JOINER else letter.encode("unicode_escape").decode()
        for letter in text
    )
