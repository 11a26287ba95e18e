"""Packages with plugins as pip leaves them: modules beside their metadata, without the minutes that pip takes."""

from __future__ import annotations

from pathlib import Path

import pytest

PLUGIN = """
import distill


class {class_name}(distill.Tracker):
    '''Theirs.'''

    name = "{name}"

    def start(self, run): ...

    def log(self, metrics, step): ...


@distill.hookimpl
def register_trackers():
    return [{class_name}]
"""
"""A module with one tracker."""


def tracker(name: str) -> str:
    """The text of a module with the tracker `name`."""
    return PLUGIN.format(name=name, class_name=name.title().replace("-", ""))


def install(
    patch: pytest.MonkeyPatch, folder: Path, package: str, files: dict[str, str], *, version: str = "1.2", **points: str
) -> None:
    """Put a package onto the path for the time of a test.

    Args:
        patch: Of the test.
        folder: Where it goes; several may share one.
        package: Its name.
        files: Path -> text.
        version: Its version.
        points: Name of an entry point (underscores for dashes) -> what it names.
    """
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name.replace('_', '-')} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[distill.plugins]", *lines]) + "\n")
    patch.syspath_prepend(str(folder))
