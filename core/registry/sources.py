"""Where plugins come from: built in, installed packages (entry points), single files."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from ..errors import UserError, described, is_failure
from ..plugin_api import hookspecs
from ..plugin_api.version import check_file, check_module
from ..utils.files import file_problem
from ..utils.suggest import did_you_mean

ENTRY_POINTS = "distill.plugins"
SELECTION = "DISTILL_PLUGINS"
"""Environment variable: which installed packages' plugins load."""
BUILT_IN_PACKAGES = ("distill_methods", "model_families", "data_backends", "plugins")
ROOT = __name__.rsplit(".", 3)[0]


def built_in_modules() -> Iterator[ModuleType]:
    """The modules of the four folders that implement a hook."""
    for package_name in BUILT_IN_PACKAGES:
        package = importlib.import_module(f"{ROOT}.{package_name}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
            if info.ispkg or info.name.startswith("_"):
                continue
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            if any(hasattr(value, f"{hookspecs.PROJECT}_impl") for value in vars(module).values()):
                yield module


# -- installed packages -----------------------------------------------------------------------------------------------


def installed() -> list[EntryPoint]:
    """Entry points of every installed plugin, by the names of their packages."""
    return sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (canonical(package_of(point)), point.name))


def selected() -> list[EntryPoint]:
    """Entry points that ``DISTILL_PLUGINS`` lets load: all where it is not set, none where it is empty.

    Raises:
        UserError: It names something that is not installed.
    """
    points, wanted = installed(), os.environ.get(SELECTION)
    if wanted is None:
        return points
    names = {canonical(part): part.strip() for part in wanted.split(",") if part.strip()}
    known = {name: point for point in points for name in _names(point)}
    for name, written in names.items():
        if name not in known:
            there = ", ".join(dict.fromkeys(map(package_of, points))) or "none"
            raise UserError(
                f"{SELECTION} names {written!r}, and no plugin of that name is installed.",
                f"{did_you_mean(name, known)}installed plugins: {there}. {SELECTION} is a list with "
                "commas; empty it loads none, unset all.",
            )
    return [point for point in points if names.keys() & set(_names(point))]


def canonical(name: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def package_of(point: EntryPoint) -> str:
    """The name of the package that the entry point belongs to."""
    return point.dist.name if point.dist else point.value


def version_of(point: EntryPoint) -> str:
    """The version of that package."""
    return point.dist.version if point.dist else ""


def _names(point: EntryPoint) -> tuple[str, str]:
    return canonical(package_of(point)), canonical(point.name)


def load_entry_point(point: EntryPoint, label: str) -> object:
    """Import and return the object that the entry point names.

    Raises:
        UserError: It was built for another API, or cannot be imported.
    """
    try:
        check_module(point.module, label)
        return point.load()
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise UserError(
            f"{label} cannot be imported: {described(error)}.",
            f"mend it, or pip uninstall {package_of(point)}.",
        ) from error


def without(point: EntryPoint, points: Sequence[EntryPoint]) -> str:
    """How to go on without the plugin of `point`."""
    own = package_of(point)
    others = [other.name if package_of(other) == own else package_of(other) for other in points if other != point]
    kept = ",".join(dict.fromkeys(others))
    what = "only the others load" if kept else "no installed plugin loads"
    return f"To go on without it, set the environment variable {SELECTION}={kept} ({what})."


# -- files ------------------------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    """Return the name that the module of a plugin file has; no two files share one."""
    stem = re.sub(r"\W", "_", path.stem)
    return f"distill_plugin_{stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def import_file(path: Path) -> ModuleType:
    """A plugin file as a module of a name of its own.

    Raises:
        UserError: It is not there, was built for another API, or cannot be imported.
    """
    problem = file_problem(path)
    if problem is not None:
        raise UserError(f"plugin file {path} {problem}.", "give --plugin the path of a Python file.")
    name = module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin file {path} is not a Python file.", "plugin files end in .py.")
    check_file(path, f"plugin file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not is_failure(error):
            raise
        line = _line_in(error, path)
        raise UserError(
            f"plugin file {path} cannot be imported{line}: {described(error)}.",
            "mend the file; `python FILE` shows the same error.",
        ) from error
    return module


def _line_in(error: BaseException, path: Path) -> str:
    """`` (line N)`` of the deepest frame of `error` inside `path`."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f" (line {line})" if line else ""
