"""Files by the name that a user gives: a path, a folder, a glob, a brace range, a URL, or several of these."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from ...errors import BadValue
from ...storage import RemoteStore, is_remote, open_store

ASKED_AT_ONCE = 16
"""Remote files whose sizes are asked for at the same time."""
MAX_BRACES = 1_000_000
"""Files that one brace range may name."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Location:
    """One file, on this machine or in a remote store.

    Attributes:
        path: Its path or URL, for messages.
        store: The store that holds it.
        key: Its key in the store.
        size: Bytes.
        version: Changes when the content does.
    """

    path: str
    store: RemoteStore
    key: str
    size: int = 0
    version: str = ""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return Path(self.key.partition("?")[0]).name

    def open(self) -> BinaryIO:
        """Open the file for reading, seekable."""
        return self.store.open(self.key)

    def read(self, start: int, length: int) -> bytes:
        """Read a part of the file. Raises FileNotFoundError where the file has another version by now."""
        fetched = self.store.fetch(self.key, start, length, version=self.version)
        skip = start - fetched.start
        return fetched.data[skip : skip + length]

    def known(self) -> Location:
        """Return the location with size and version filled in. Raises FileNotFoundError, PermissionError."""
        entry = self.store.stat(self.key)
        return Location(self.path, self.store, self.key, entry.size, entry.version)


@lru_cache(maxsize=64)
def _store(root: str) -> RemoteStore:
    return open_store(root)


def at(path: str) -> Location:
    """Return the location of a path or URL without looking whether it exists."""
    if not is_remote(path):
        return Location(path, _store("/"), str(Path(path).expanduser().absolute()))
    scheme, _, rest = path.partition("://")
    host, _, key = rest.partition("/")
    store = _store(f"{scheme}://{host}")
    return Location(f"{store.url.rstrip('/')}/{key.partition('?')[0]}", store, key)


def locate(key: str, given: Sequence[str], suffixes: Sequence[str]) -> list[Location]:
    """Find the files that an entry's `key` names; those of one text come in sorted order.

    Args:
        key: The entry's key, for messages.
        given: Paths and URLs of files, or of folders of files, with globs and ``{000..012}`` or ``{a,b}``.
        suffixes: Endings of the files that are taken from folders.

    Raises:
        BadValue: Nothing is there.
    """
    return [file for text in given for file in _locate(key, text, suffixes)]


def _locate(key: str, text: str, suffixes: Sequence[str]) -> list[Location]:
    patterns = list(_unbraced(key, text))
    try:
        found = [file for pattern in patterns for file in _matching(pattern, suffixes)]
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            found = list(pool.map(lambda file: file if file.version else file.known(), found))
    except FileNotFoundError as error:
        remedy = "give files that are there (a relative path is relative to the file that names it)"
        raise BadValue(key, error.filename or text, "does not exist", remedy) from error
    except OSError as error:
        raise BadValue(key, text, f"cannot be read: {error.strerror or error}", "give readable files") from error
    if not found:
        remedy = f"give a file, or a folder of {' or '.join(suffixes)} files"
        raise BadValue(key, text, f"holds no {' or '.join(suffixes)} file", remedy)
    return found


def _unbraced(key: str, text: str) -> Iterator[str]:
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    span = _RANGE.fullmatch(match[1])
    if span is None:
        parts = match[1].split(",")
    else:
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= MAX_BRACES:
            problem = f"{match[0]} is no range that grows, of at most {MAX_BRACES:,} files"
            raise BadValue(key, text, problem, "write it as {000..012}")
        parts = [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
    for part in parts:
        yield from _unbraced(key, text[: match.start()] + part + text[match.end() :])


def _matching(path: str, suffixes: Sequence[str]) -> Iterator[Location]:
    if is_remote(path):
        yield from _remote(path, suffixes)
    elif glob.has_magic(path) and not Path(path).exists():
        yield from (at(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file())
    elif Path(path).is_dir():
        yield from _below(path, suffixes)
    else:
        yield at(path)


def _below(path: str, suffixes: Sequence[str]) -> Iterator[Location]:
    store = open_store(path)
    for entry in store.list():
        if entry.key.lower().endswith(tuple(suffixes)):
            yield Location(f"{path.rstrip('/')}/{entry.key}", store, entry.key, entry.size, entry.version)


def _remote(path: str, suffixes: Sequence[str]) -> Iterator[Location]:
    file = at(path)
    inside = file.key.partition("?")[0]
    if "?" not in file.key and glob.has_magic(inside):
        for entry in file.store.list(re.split(r"[*?\[]", inside)[0]):
            if fnmatchcase(entry.key, inside):
                yield _entry(file.store, entry.key, entry.size, entry.version)
    elif inside.lower().endswith(tuple(suffixes)) or path.lower().startswith("http"):
        yield file
    else:
        for entry in file.store.list(f"{inside.rstrip('/')}/" if inside else ""):
            if entry.key.lower().endswith(tuple(suffixes)):
                yield _entry(file.store, entry.key, entry.size, entry.version)


def _entry(store: RemoteStore, key: str, size: int, version: str) -> Location:
    return Location(f"{store.url.rstrip('/')}/{key}", store, key, size, version)


def identity_of(files: Sequence[Location], *more: object) -> str:
    """Return a hash of the names, sizes and versions of files and of anything else that is given; their folder does not
    matter.
    """
    described = [[file.name, file.size, file.version] for file in files]
    return blake2b(json.dumps([described, *more]).encode(), digest_size=16).hexdigest()
