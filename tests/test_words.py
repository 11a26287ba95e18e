"""Things are called by the field's words: of the words that only this project used, none is left."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    # diffusion
    "jump", "as_kind", "guide", "teacher_cfg", "with_and_without", "Draws", "is_told", "_told", "told_time", "telling",
    "noise_further", "matching_loss", "matching_gradient", "_apart", "Walk", "trailing_walk",
    # data
    "Pairs", "CachedPairs", "WantedPairs", "Spool", "Workshop", "Passage", "passing", "Marks", "vetted", "Survey",
    "survey", "places", "Places", "CachePlaces", "Located", "Share", "Shape", "Order",
    # engine
    "checkpoints_there", "latents_there", "texts_there", "pairs_there", "_there", "bring", "settle", "_settle",
    "together", "aside", "_aside", "Aside", "care", "_care", "OptimizerCare", "say",
    # files
    "RunParts", "Judge", "Found",
}  # fmt: skip
"""Identifiers that another word has taken the place of."""
MODULES = {
    "finish", "assemble", "run_parts", "found", "judge", "matching", "terms", "vetting", "survey", "spool", "workshop",
    "passing", "located", "places", "teacher_path", "plugin_calls",
}  # fmt: skip
ONE_CLASS_EACH = ("Recipe", "Loader", "Grid", "Report", "Survey", "Progress")
PICTURES = re.compile(r"\bpictures?\b", re.IGNORECASE)
FOREIGN = ("model_families/assets/", "CHANGELOG.md", "tests/test_words.py")
"""Captions and prompts, the history, and this list."""


def files(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [
        ROOT / name for name in listed.stdout.splitlines() if not name.startswith(FOREIGN) and (ROOT / name).is_file()
    ]


def identifiers(code: str) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def test_no_identifier_is_one_of_the_old_words():
    found = {
        f"{path.relative_to(ROOT)}: {', '.join(sorted(words))}"
        for path in files("*.py")
        if (words := identifiers(path.read_text(encoding="utf-8")) & NAMES)
    }
    assert not found, sorted(found)


def test_the_reader_of_identifiers_leaves_texts_out():
    assert identifiers("def jump(x):\n    return 'settle', x.walk  # bring\n") == {"def", "jump", "x", "return", "walk"}


def test_no_module_has_one_of_the_old_names():
    old = [path for path in files("core/*.py", "plugins/*.py", "model_families/*.py") if path.stem in MODULES]
    assert not old, old


@pytest.mark.parametrize("name", ONE_CLASS_EACH)
def test_no_two_classes_share_a_name(name):
    homes = [path for path in files("*.py") if re.search(rf"^class {name}\b", path.read_text(encoding="utf-8"), re.M)]
    homes = [path for path in homes if path.is_relative_to(ROOT / "core") or path.parent.name.startswith("distill_")]
    assert len(homes) <= 1, homes


def test_images_are_called_images():
    written = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in files("*.py", "*.md", "*.template", "*.html", "*.toml")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if PICTURES.search(line)
    }
    assert not written, sorted(written)
