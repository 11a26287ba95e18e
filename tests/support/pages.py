"""The pages of the documentation and the fenced blocks in them.

A comment in the line above a block says how it is run here, where that differs from how it stands:

    <!-- run with: ARGUMENTS -->         added to `distill run`, `plugins check` and what takes `--config`
    <!-- set: A = B; C = D -->           A is B in the code, as a hub id that is a folder here, and C is D
    <!-- held by: tests/x.py::test_y --> not run by itself: this test does what it says, or does it with others
    <!-- slow: ARGUMENTS -->             a benchmark, run by `pytest -m slow` with these arguments after its own

A block with a file's name after its language (`json domain.json`) is written there; with ` +` behind, added to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"^(?P<comments>(?:<!--.*?-->\n)*)"
    r"```(?P<language>\w*)(?: (?P<file>[\w./-]+)(?P<more> \+)?)?\n(?P<content>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!-- (run with|set|held by|slow): (.+?) -->")
_FENCE = re.compile(r"^ *(`{3,}|~{3,})", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path of its page from the root.
        line: Number of its first line.
        language: What stands behind the fence; may be empty.
        file: The file that it is, or empty.
        adds: Whether it goes on with that file.
        content: Its lines.
        comments: What the comments above it say, by their first words.
    """

    page: str
    line: int
    language: str
    file: str
    adds: bool
    content: str
    comments: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page: beside the code, of the documentation, of the examples."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    found += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "examples").rglob("*.md"))
    return [path.relative_to(ROOT).as_posix() for path in found]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order. Raises ValueError for a fence that is no block."""
    whole = text(page)
    found = [
        Block(
            page,
            whole[: match.end("comments")].count("\n") + 1,
            match["language"],
            match["file"] or "",
            bool(match["more"]),
            match["content"],
            dict(_COMMENT.findall(match["comments"])),
        )
        for match in _BLOCK.finditer(whole)
    ]
    left = _FENCE.search(_BLOCK.sub("", whole))
    if left:
        raise ValueError(f"{page}: a fence that no block is made of: {whole[left.start() : left.start() + 40]!r}")
    return found


def without_blocks(page: str) -> str:
    """The prose of a page."""
    return _BLOCK.sub("", text(page))


def files_of(page: str) -> dict[str, str]:
    """File -> its content, of the blocks of a page that are files."""
    found: dict[str, str] = {}
    for block in blocks(page):
        if block.file:
            found[block.file] = f"{found[block.file]}\n{block.content}" if block.adds else block.content
    return found
