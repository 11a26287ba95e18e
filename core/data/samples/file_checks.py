# pyright: reportAttributeAccessIssue=false
"""What a listing alone tells of files that cannot be used, and names that can be shown and written down."""

from __future__ import annotations

import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from ...plugin_api.backend import Entry
from .images import EMPTY_FILE, MAX_FILE_BYTES, too_many_bytes

NO_NAME = "its name is no UTF-8: rename it"
JOINER = "\u200d"
"""Inside of emoji; the one character without a shape of its own that names are shown with."""


def named(entry: Entry) -> Entry:
    """The entry under a key that is text: a name that is no UTF-8 cannot be written to a table, nor in a message."""
    if not any("\ud800" <= letter <= "\udfff" for letter in entry.key):
        return entry
    key = os.fsencode(entry.key).decode("utf-8", "backslashreplace")
    return replace(entry, key=key, problem=entry.problem or NO_NAME)


def checked_images(images: pa.RecordBatch) -> pa.RecordBatch:
    """Listed image files (columns size, problem), those with a problem that their size tells."""
    sizes, problems = images["size"], images["problem"]
    found = pc.case_when(
        pc.make_struct(pc.not_equal(problems, ""), pc.equal(sizes, 0), pc.greater(sizes, MAX_FILE_BYTES)),
        problems, EMPTY_FILE, too_many_bytes(), "",
    )  # fmt: skip
    return images.set_column(images.schema.get_field_index("problem"), "problem", found.cast(pa.large_string()))


def printable(text: str) -> str:
    r"""A name or a reason on one line, what has no shape escaped (``\n``, ``\x1b``), so that it can be read back."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == JOINER else letter.encode("unicode_escape").decode()
        for letter in text
    )
