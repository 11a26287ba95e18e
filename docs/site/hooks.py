"""What the site has that the pages alone lack: files of the repository that they link to, titles of code blocks."""

from __future__ import annotations

import atexit
import posixpath
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
BESIDE = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages beside docs/ that are in the navigation -> where they are in the site."""
SOURCE = "source/"
"""Where other files of the repository are in the site, each as a page of its own."""
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json"}
NAMED_BLOCK = re.compile(r"^(```\w+) ([\w./-]+)( \+)?$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_startup(**_: Any) -> None:
    """Let the API page find the package, whose folder is the repository's, under its name."""
    place = tempfile.TemporaryDirectory(prefix="distill-site-")
    atexit.register(place.cleanup)
    Path(place.name, "distill").symlink_to(ROOT)
    sys.path.insert(0, place.name)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages beside docs/, and one for every file of the repository that a page links to."""
    for name, uri in BESIDE.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        for name in linked_files(files, waiting.pop()):
            if files.get_file_from_path(site_place(name)) is None:
                files.append(File.generated(config, site_place(name), content=source_page(name)))
                waiting.append(site_place(name))
    return files


def site_place(name: str) -> str:
    """Where a file of the repository is in the site."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return BESIDE.get(name, f"{SOURCE}{name}.md")


def repository_place(uri: str) -> str:
    """The reverse of :func:`site_place`."""
    if uri.startswith(SOURCE):
        return uri.removeprefix(SOURCE).removesuffix(".md")
    return next((name for name, place in BESIDE.items() if place == uri), f"docs/{uri}")


def linked(uri: str, target: str) -> str:
    """The path from the root of the repository that a link of the page means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(repository_place(uri)), target))


def linked_files(files: Files, uri: str) -> set[str]:
    """Files of the repository outside docs/ that the page links to."""
    page = files.get_file_from_path(uri)
    if page is None or not is_prose(uri):
        return set()
    found = {linked(uri, match[2]) for match in LINK.finditer(page.content_string)}
    return {name for name in found if not name.startswith("docs/") and (ROOT / name).is_file()}


def is_prose(uri: str) -> bool:
    """Whether a page is written text, and not a file that is shown."""
    return repository_place(uri).endswith(".md")


def source_page(name: str) -> str:
    """A page that shows a file of the repository."""
    path = ROOT / name
    text = path.read_text(encoding="utf-8").rstrip("\n")
    if path.suffix != ".md":
        text = f"# {name}\n\n`````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n`````"
    return f"---\nsearch:\n  exclude: true\n---\n\n{text}\n"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Titles over blocks that are files; links to where their targets are in the site."""
    uri = page.file.src_uri
    if not is_prose(uri):
        return markdown
    return LINK.sub(lambda match: site_link(uri, match), NAMED_BLOCK.sub(r'\1 title="\2"', markdown))


def site_link(uri: str, match: re.Match[str]) -> str:
    """A link of the page as the site has it; of a link to a folder, its text."""
    text, target, anchor = match[1], linked(uri, match[2]), match[3] or ""
    if (ROOT / target).is_dir():
        return text
    return f"[{text}]({posixpath.relpath(site_place(target), posixpath.dirname(uri) or '.')}{anchor})"
