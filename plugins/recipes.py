"""The recipes that ship with the package: published settings, a file each in the folder `recipes`."""

from __future__ import annotations

from pathlib import Path

from ..core.plugin_api.hookspecs import hookimpl

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


@hookimpl
def register_recipes() -> list[Path]:
    """Return the files of the folder."""
    return sorted(FOLDER.glob("*.yaml"))
