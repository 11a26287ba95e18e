"""Detects installed third-party packages without importing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import util


def is_installed(name: str) -> bool:
    """Return True if the module `name` (dotted, too) can be imported; a mere folder of that name is none."""
    try:
        spec = util.find_spec(name)
    except ModuleNotFoundError:  # of a dotted name the package around it
        return False
    return spec is not None and spec.origin is not None


def missing(packages: Mapping[str, str]) -> dict[str, str]:
    """Return those of `packages` (import name -> name to pip install) that are not installed."""
    return {name: install for name, install in packages.items() if not is_installed(name)}


def problems(packages: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (problem, remedy) for each of `packages` that is not installed, for the key that asks for it."""
    for name, install in missing(packages).items():
        yield f"needs the package {name}, which is not installed", f"pip install '{install}'"


def install_line(packages: Mapping[str, str]) -> str:
    """Return ``pip install 'a>=1' 'b'`` from import name -> name to pip install."""
    return " ".join(["pip install", *(f"'{install}'" for install in dict.fromkeys(packages.values()))])


def missing_packages(packages: Mapping[str, str]) -> str | None:
    """Return None, or a sentence that names the packages that cannot be imported and how to install them.

    Args:
        packages: Import name -> name to pip install.
    """
    absent = missing(packages)
    if not absent:
        return None
    verb = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {verb} not installed ({install_line(absent)})"
