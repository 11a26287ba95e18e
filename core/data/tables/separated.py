"""Separated values as programs really write them: by commas, semicolons, tabs or bars, in UTF-8 or UTF-16.

Python's own reader parses them, in the thread that asks: Arrow's reads ahead in a thread of its own, which aborts the
process at its end where an error has left the reader open.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import BinaryIO

SEPARATORS = (",", ";", "\t", "|")
DECLARED = "sep="
"""Beginning of the line in which Excel declares the separator."""
LARGEST_VALUE = 2**24
"""Characters of one value; more are taken for a quote that nobody closes."""
UNCLOSED = "unexpected end of data"
"""The error of Python's reader, when it is strict, for a quote that nobody closes."""


def records(stream: BinaryIO, *, usual: str) -> Iterator[list[str]]:
    """Yield the names of the columns, then the values of each row; empty lines are skipped.

    Args:
        stream: The file, at its beginning.
        usual: The separator that the file's name promises; where it does not part the columns, another is looked for.

    Raises:
        ValueError: A row has another number of values than there are columns, or the file is no such text; says where.
    """
    csv.field_size_limit(LARGEST_VALUE)
    lines = _lines(stream)
    head = list(islice(lines, 2))
    if head and (declared := _declared(head[0])):
        usual, head = declared, [*head[1:], *islice(lines, 1)]
    separator, kept, number = separator_of(head, usual=usual), list[str](), 0
    width, rows = 0, filter(None, csv.reader(_remembered(chain(head, lines), kept), delimiter=separator))
    while values := _next(rows, number + 1):
        number, width = number + 1, width or len(values)
        if len(values) != width:
            text = " ".join("".join(kept).split())[:80]
            raise ValueError(f"Row #{number}: Expected {width} columns, got {len(values)}: {text}")
        _check_closed(kept, separator, number)
        kept.clear()
        yield values


def _next(rows: Iterator[list[str]], number: int) -> list[str] | None:
    try:
        return next(rows, None)
    except csv.Error as error:
        raise ValueError(f"Row #{number}: {error}") from error


def _check_closed(lines: Sequence[str], separator: str, number: int) -> None:
    """Raise ValueError if the lines of a row end inside quotes, which only the end of the file can bring about."""
    if "".join(lines).count('"') % 2 == 0:
        return
    try:
        list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as error:
        if str(error) == UNCLOSED:
            begins = " ".join(lines[0].split())[:80]
            raise ValueError(f"Row #{number}: a double quote is opened and never closed: {begins}") from error


def separator_of(head: Sequence[str], *, usual: str) -> str:
    """Return the separator of a table that begins with the lines `head`: the usual one, unless only another parts the
    names of the columns, and the first row alike.
    """
    counts = {each: [_num_values(line, each) for line in head] for each in (usual, *SEPARATORS)}
    fitting = {each: found[0] for each, found in counts.items() if found and found[0] > 1 and len(set(found)) == 1}
    if usual in fitting or not head or (counts[usual][0] > 1 and not fitting):
        return usual
    candidates = fitting or {each: found[0] for each, found in counts.items()}
    return max(candidates, key=lambda each: candidates[each])


def _num_values(line: str, separator: str) -> int:
    return len(next(csv.reader([line[:LARGEST_VALUE]], delimiter=separator), []))


def _declared(line: str) -> str:
    beginning, separator = line[: len(DECLARED)].lower(), line[len(DECLARED) :].strip("\r\n")
    return separator if beginning == DECLARED and separator in SEPARATORS else ""


def _remembered(lines: Iterable[str], kept: list[str]) -> Iterator[str]:
    """Yield the lines, which are added to `kept`."""
    for line in lines:
        kept.append(line)
        yield line


def _lines(stream: BinaryIO) -> Iterator[str]:
    """Yield the lines with their ends, wherever a line ends by any system's custom. Raises ValueError."""
    begins = stream.read(2)
    stream.seek(0)
    if begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        yield from io.TextIOWrapper(stream, "utf-16", newline="")
        return
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} is not UTF-8 (byte {error.start})") from error
        if "\0" in text:
            raise ValueError(f"line {number} holds NUL bytes: it is no text, or UTF-16 without its mark")
        yield from io.StringIO(text, newline="") if "\r" in text else (text,)
