"""Finds and imports the plugin that a user names, and the classes that it registers."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ..errors import DistillError, UserError, described, is_failure
from ..registry.registry import ENTRY_POINTS, HOOKS, Registry
from .checks import Check, ConformanceError, NotApplicable
from .suite import checks_of


@dataclass(frozen=True)
class Source:
    """One plugin: a module, or an object with hooks."""

    label: str
    plugin: Any


def sources_of(argument: str) -> list[Source]:
    """Return the plugins that `argument` names.

    Raises:
        UserError: There is nothing of that name, or it cannot be imported.
    """
    path = Path(argument).expanduser()
    if path.is_dir():
        return _of_project(path.resolve())
    if path.suffix == ".py" or path.is_file():
        return [Source(argument, _of_file(path.resolve()))]
    installed = _of_distribution(argument)
    if installed:
        return installed
    if re.fullmatch(r"[\w.]+", argument) and _importable(argument):
        return [Source(f"module {argument}", _imported(argument))]
    raise UserError(
        f"{argument!r} is neither a file, nor a folder, nor an installed package with entry points, nor a module.",
        "give a plugin file (my_method.py), a folder with a pyproject.toml, or a name that Python can import.",
    )


def _of_file(path: Path) -> Any:
    try:
        Registry().add_file(path)
    except DistillError:
        # what the registry refuses is a failing check; what cannot be imported leaves no module behind
        if not _module_of(path):
            raise
    return _module_of(path)


def _module_of(path: Path) -> Any:
    return next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(path)), None)


def _of_project(folder: Path) -> list[Source]:
    file = folder / "pyproject.toml"
    if not file.is_file():
        raise UserError(f"{folder} has no pyproject.toml.", "give a plugin file, or the folder of a Python project.")
    try:
        points = tomllib.loads(file.read_text("utf-8")).get("project", {}).get("entry-points", {}).get(ENTRY_POINTS, {})
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} cannot be read: {error}.", "mend the file.") from error
    if not points:
        raise UserError(
            f"{file} names no entry points for distill.",
            f'add `[project.entry-points."{ENTRY_POINTS}"]` with `mine = "my_package.my_module"`.',
        )
    for place in (folder, folder / "src"):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    return [Source(f"entry point {name}", _imported(value)) for name, value in points.items()]


def _of_distribution(name: str) -> list[Source]:
    try:
        found = distribution(name)
    except (PackageNotFoundError, ValueError):
        return []
    points = [point for point in found.entry_points if point.group == ENTRY_POINTS]
    return [Source(f"package {found.name} {found.version}, {point.name}", _imported(point.value)) for point in points]


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _imported(value: str) -> Any:
    """Return the module, or the object in it after a colon."""
    name, _, attribute = value.partition(":")
    try:
        found: Any = importlib.import_module(name.strip())
        for part in filter(None, attribute.strip().split(".")):
            found = getattr(found, part)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise UserError(
            f"{value} cannot be imported: {described(error)}.", f"`python -c 'import {name}'` shows where."
        ) from error
    return found


# -- what it registers ------------------------------------------------------------------------------------------------


def checks_of_source(source: Source) -> Iterator[Check]:
    """Yield the check that the registry takes it, and every check of every class that its hooks return."""
    yield Check(source.label, "the registry takes it", partial(_registered, source))
    for found in classes_of(source.plugin):
        yield from checks_of(found)


def _registered(source: Source) -> None:
    if getattr(source.plugin, "__name__", "").partition(".")[0] == __name__.partition(".")[0]:
        raise NotApplicable("it is built in, and there already")
    registry = Registry.load(installed=False)
    try:
        registry.add(source.plugin, source=source.label, name=getattr(source.plugin, "__name__", source.label))
    except DistillError as error:
        raise ConformanceError(" ".join(str(error).split())) from error


def classes_of(plugin: Any) -> list[type[Any]]:
    """Return the plugin classes that its registration hooks return; the registry refuses anything else."""
    from .common import kind_of

    found: dict[type[Any], None] = {}
    for hook in HOOKS.values():
        offered: Callable[[], Iterable[Any]] | None = getattr(plugin, hook, None)
        try:
            classes = [] if offered is None else list(offered())
        except BaseException as error:  # the registry calls the same hook and says what happened
            if not is_failure(error):
                raise
            classes = []
        for each in classes:
            try:
                kind_of(each)
            except TypeError:
                continue
            found[each] = None
    return list(found)
