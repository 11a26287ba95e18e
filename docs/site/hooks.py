"""What the site has that the pages alone lack: files of the repository that they link to, titles of code blocks."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Pages that lie beside docs/ -> where they are in the site."""
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".txt": "text", ".md": "markdown"}
NAMED_BLOCK = re.compile(r"^(```\w+) ([\w./-]+)$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages beside docs/, and one for every source file that a page links to."""
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        files.append(File.generated(config, PAGES[name], content=(ROOT / name).read_text(encoding="utf-8")))
    for name in sorted(set(linked_sources(files))):
        files.append(File.generated(config, f"source/{name}.md", content=source_page(name)))
    return files


def linked_sources(files: Files) -> list[str]:
    """Files of the repository outside docs/ that pages link to."""
    found = []
    for file in files.documentation_pages():
        for match in LINK.finditer(file.content_string):
            path = in_repository(file.src_uri, match[1])
            if path not in PAGES and not path.startswith("docs/") and (ROOT / path).is_file():
                found.append(path)
    return found


def in_repository(page: str, target: str) -> str:
    """The path from the root of the repository that a link of `page` means."""
    inside = page if page in ("contributing.md", "changelog.md") else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(inside), target))


def source_page(name: str) -> str:
    """A page that shows a file of the repository."""
    language = LANGUAGES.get(Path(name).suffix, "text")
    text = (ROOT / name).read_text(encoding="utf-8").rstrip("\n")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n`````{language}\n{text}\n`````\n"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Titles over blocks that are files; links to what lies outside docs/."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    return LINK.sub(lambda match: site_link(uri, match), NAMED_BLOCK.sub(r'\1 title="\2"', markdown))


def site_link(page: str, match: re.Match[str]) -> str:
    """The link of a page of the repository as the site has it."""
    path, anchor = in_repository(page, match[1]), match[2] or ""
    if path.startswith("docs/"):
        target = path.removeprefix("docs/")
    elif path in PAGES:
        target = PAGES[path]
    else:
        target = f"source/{path}.md"
    return posixpath.relpath(target, posixpath.dirname(page) or ".") + anchor
