"""The built site: without a warning, every page in its navigation, found by its search, with nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import distill
import pytest
from support.pages import ROOT


class Page(HTMLParser):
    """Where a page points to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.navigation: list[str] = []
        self._inside = 0
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self._inside += tag == "nav"
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
            self.navigation += [given["href"]] if self._inside else []
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loaded.append(given["href"])

    def handle_endtag(self, tag):
        self._inside -= tag == "nav"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_every_page_is_in_the_navigation(site):
    home = Page(site / "index.html")
    there = {(site / link.split("#")[0] / "index.html").resolve() for link in home.navigation if "://" not in link}
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if (site / built(path)).resolve() not in there
    ]
    assert not missing, f"add them to docs/.nav.yml: {missing}"


def built(page: Path) -> Path:
    """Where a page of docs/ is in the site."""
    relative = page.relative_to(ROOT / "docs")
    return relative.with_name("index.html") if relative.name == "index.md" else relative.with_suffix("") / "index.html"


def test_nothing_is_loaded_from_elsewhere(site):
    wrong = [
        f"{file.relative_to(site)}: {address}"
        for file in site.rglob("*.html")
        for address in Page(file).loaded
        if re.match(r"(https?:)?//", address)
    ]
    assert not wrong, wrong
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert not re.findall(r"url\(.?https?:", styles)


def test_links_inside_the_site_lead_somewhere(site):
    wrong = []
    for file in site.rglob("index.html"):
        for link in Page(file).links:
            target = link.split("#")[0].split("?")[0]
            if target and not re.match(r"\w+:|/", link) and not (file.parent / target).exists():
                wrong.append(f"{file.relative_to(site)}: {link}")
    assert not wrong, wrong[:10]


def test_the_search_finds_pages_and_no_source_files(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    pages = {entry["location"].split("#")[0] for entry in entries}
    assert {"lcm/", "tutorials/your-own-method/", "api/", "contributing/"} <= pages
    assert not [place for place in pages if place.startswith("source/")]


def test_the_api_page_has_every_public_name(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    names = set(distill.__all__) - {"__version__", "hookimpl", "Conditioning"}
    assert not [name for name in sorted(names) if f'id="distill.{name}"' not in page]


def test_blocks_that_are_files_have_their_names(site):
    page = (site / "tutorials" / "your-own-method" / "index.html").read_text(encoding="utf-8")
    assert page.count('<span class="filename">leap.py</span>') == 7
    assert "```" not in page
