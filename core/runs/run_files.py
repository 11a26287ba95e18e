"""What a run has written into its folder: the list that decides what may be removed again.

``written.jsonl`` holds a line before anything is written ("claim", with what lay there already) and one when it is
complete ("wrote", with the size of each file). What is in no line is somebody else's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..data.cache.manifests import whole_lines
from ..utils.files import append_line

FILE = "written.jsonl"
ANY = "*"
"""The claim on every name that comes at the top of the folder."""
_TEMPORARY = re.compile(r"\.(?:partial-[0-9a-f]{12}-)?(.+?)(?:\.(?:partial|replaced|deleted))?")
"""Names under which files and folders are written, or wait to be removed."""


@dataclass
class Claim:
    """What a run wrote under one name.

    Attributes:
        foreign: Files that lay there before, by their path in the output folder.
        sizes: Bytes of each file that the run wrote; None while it is at it.
    """

    foreign: set[str] = field(default_factory=set)
    sizes: dict[str, int] | None = None

    def holds(self, path: str, size: int) -> bool:
        """Return True if a file is the run's, and still what the run wrote."""
        if path in self.foreign:
            return False
        return self.sizes is None or self.sizes.get(path) == size


class RunFiles:
    """The list of one output folder.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._claims = dict(_read(folder / FILE))

    @contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """Make the folder, note what is about to be written in the block, and afterwards what was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claim(*names)
        yield
        self.wrote(*names)

    def claim(self, *names: str) -> None:
        """Note that the run will write there; what lies there already and is not the run's stays somebody else's.

        Args:
            names: Paths of files or folders, relative to the output folder.
        """
        for name in names:
            known = self._claims.get(name, Claim(sizes={}))
            self._open(name, known.foreign | {path for path, size in self._below(name) if not known.holds(path, size)})

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Claim every name at the top of the folder that the block makes; give the list that they are put into."""
        made, before = list[str](), set(_top(self.folder))
        self._open(ANY, before)
        yield made
        made += [name for name in _top(self.folder) if name not in before]
        for name in made:
            self._open(name, set())
        self.wrote(ANY)

    def adopt(self, *names: str) -> None:
        """Note as the run's what lies there complete."""
        for name in names:
            self._open(name, set())
        self.wrote(*names)

    def _open(self, name: str, foreign: set[str]) -> None:
        self._claims[name] = Claim(foreign)
        self._note({"claim": name, "foreign": sorted(foreign)})

    def wrote(self, *names: str) -> None:
        """Note that what was claimed is complete."""
        for name in names:
            claim = self._claims[name]
            claim.sizes = {path: size for path, size in self._below(name) if path not in claim.foreign}
            self._note({"wrote": name, "files": claim.sizes})

    @property
    def claimed(self) -> tuple[str, ...]:
        """The names that the run has claimed."""
        return tuple(name for name in self._claims if name != ANY)

    def foreign(self, in_the_way: Callable[[str], bool]) -> list[str]:
        """List what lies in the way of a run and was not written by this one, as paths in the output folder.

        Args:
            in_the_way: Tells of a name at the top of the folder whether a run uses it.
        """
        names = [name for name in _top(self.folder) if in_the_way(name)]
        return sorted(path for name in names for path in self._foreign_below(name))

    def remove(self) -> None:
        """Remove everything that the run wrote, and folders that are empty afterwards."""
        for name in filter(self._touches, _top(self.folder)):
            for path, size in list(self._below(name)):
                if self._owns(path, size):
                    (self.folder / path).unlink(missing_ok=True)
            _remove_empty(self.folder / name)
        (self.folder / FILE).unlink(missing_ok=True)
        self._claims = {}

    # -- the parts --------------------------------------------------------------------------------------------------

    def _note(self, line: Mapping[str, object]) -> None:
        append_line(self.folder / FILE, json.dumps(line))

    def _below(self, name: str) -> Iterator[tuple[str, int]]:
        """Yield path and bytes of a file, or of each file below a folder; what a link points to is not looked at."""
        path = self.folder / name
        if path.is_symlink() or path.is_file():
            yield name, -1 if path.is_symlink() else path.stat().st_size
        for parent, folders, files in os.walk(path):
            for each in (*files, *(folder for folder in folders if (Path(parent) / folder).is_symlink())):
                found = Path(parent) / each
                yield found.relative_to(self.folder).as_posix(), -1 if found.is_symlink() else found.stat().st_size

    def _foreign_below(self, name: str) -> Iterator[str]:
        path = self.folder / name
        if path.is_dir() and not path.is_symlink() and not self._touches(name):
            yield f"{name}/"
            return
        yield from (found for found, size in self._below(name) if not self._owns(found, size))

    def _touches(self, name: str) -> bool:
        """Return True if the run has written anything of a name at the top of the folder, or below it."""
        claimed = any(claim.split("/")[0] == name for claim in self._claims)
        return claimed or self._temporary(name) or self._made_by_any(name)

    def _made_by_any(self, name: str) -> bool:
        """Return True if a name at the top of the folder came while everything that came was the run's."""
        claim = self._claims.get(ANY)
        return claim is not None and claim.holds(name, -1)

    def _temporary(self, name: str) -> bool:
        """Return True if a name at the top of the folder is that of something claimed, half written or half removed."""
        found = _TEMPORARY.fullmatch(name)
        return found is not None and found[0] != f".{found[1]}" and found[1] in self._claims

    def _owns(self, path: str, size: int) -> bool:
        """Return True if the innermost claim around a path holds it."""
        parts = path.split("/")
        if self._temporary(parts[0]):
            return True
        for number in range(len(parts), 0, -1):
            claim = self._claims.get("/".join(parts[:number]))
            if claim is not None:
                return claim.holds(path, size)
        return self._made_by_any(parts[0])


def _read(file: Path) -> Iterator[tuple[str, Claim]]:
    """Yield each claim as it was noted last."""
    claims: dict[str, Claim] = {}
    for line in whole_lines(file) if file.is_file() else ():
        if "claim" in line:
            claims[line["claim"]] = Claim(set(line["foreign"]))
        elif line.get("wrote") in claims:
            claims[line["wrote"]].sizes = dict(line["files"])
    yield from claims.items()


def _top(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those below it where they hold nothing."""
    if not folder.is_dir() or folder.is_symlink():
        return
    for path in list(folder.iterdir()):
        _remove_empty(path)
    if not any(folder.iterdir()):
        folder.rmdir()
