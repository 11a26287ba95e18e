"""The registry: one plugin manager per run, and every name that plugins add to it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pluggy
from pydantic import BaseModel

from ..errors import DistillError, PluginError, UserError
from ..plugin_api import hookspecs
from ..plugin_api.backend import DataBackend
from ..plugin_api.evaluator import Evaluator
from ..plugin_api.family import ModelFamily
from ..plugin_api.method import Method
from ..plugin_api.optimizer import OptimizerPlugin
from ..plugin_api.publisher import Publisher
from ..plugin_api.quantizer import Quantizer
from ..plugin_api.tracker import Tracker
from ..utils.files import path_problem
from ..utils.suggest import did_you_mean
from .attribution import MARKER, attributed_hooks, register_owner, trace, trace_line
from .sources import ENTRY_POINTS as ENTRY_POINTS
from .sources import (
    ROOT,
    built_in_modules,
    import_file,
    installed,
    load_entry_point,
    module_name,
    package_of,
    selected,
    version_of,
    without,
)

Kind = Literal["method", "family", "data_backend", "tracker", "optimizer", "quantizer", "evaluator", "publisher"]
KINDS: tuple[str, ...] = get_args(Kind)

BASES: Mapping[str, type] = {
    "method": Method,
    "family": ModelFamily,
    "data_backend": DataBackend,
    "tracker": Tracker,
    "optimizer": OptimizerPlugin,
    "quantizer": Quantizer,
    "evaluator": Evaluator,
    "publisher": Publisher,
}
HOOKS: Mapping[str, str] = {
    "method": "register_methods",
    "family": "register_families",
    "data_backend": "register_data_backends",
    "tracker": "register_trackers",
    "optimizer": "register_optimizers",
    "quantizer": "register_quantizers",
    "evaluator": "register_evaluators",
    "publisher": "register_publishers",
}


@dataclass(frozen=True)
class Provenance:
    """Where a name comes from."""

    kind: str
    name: str
    source: str
    """``built in``, ``package NAME VERSION`` or the path of a file."""
    plugin: str
    """The plugin's own name (a module)."""
    version: str = ""
    """Of the package, or of the file where it states one (``__version__``); empty where nothing is stated."""


@dataclass(frozen=True)
class Loaded:
    """A plugin: what adds names, listens to a run, or both."""

    name: str
    source: str
    version: str
    hooks: tuple[str, ...]
    """The hooks that it implements."""


class Registry:
    """Names of every kind, resolved to classes, and the hooks of all plugins."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        trace(self._manager)
        self._classes: dict[str, dict[str, tuple[type[Any], Provenance]]] = {kind: {} for kind in KINDS}
        self._aliases: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        self._loaded: dict[str, Loaded] = {}
        self._files: list[Path] = []
        self._recipes: dict[str, tuple[Path, Provenance]] = {}

    @classmethod
    def load(
        cls, files: Iterable[str | Path] = (), *, installed: bool = True, refused: list[UserError] | None = None
    ) -> Registry:
        """Everything built in, the installed packages' entry points, and the plugin files named.

        Args:
            files: Plugin files.
            installed: Whether installed packages load, as far as ``DISTILL_PLUGINS`` lets them.
            refused: Takes the errors of installed packages that cannot be used, which are left out then.

        Raises:
            UserError: A plugin cannot be used as it is: missing, failing at import, misspelt hook, name clash.
        """
        registry = cls()
        for module in built_in_modules():
            registry.add(module, source="built in", name=module.__name__, version=_own_version())
        for point in selected() if installed else ():
            try:
                registry._add_installed(point)
            except UserError as error:
                if refused is None:
                    raise
                refused.append(error)
        for file in files:
            registry.add_file(file)
        return registry

    @property
    def hook(self) -> pluggy.HookRelay:
        """Calls a hook of every plugin, by keyword; a failing plugin raises PluginError that names it."""
        return self._manager.hook

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """All plugins, in the order of loading."""
        return tuple(self._loaded.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """Plugin files, in the order of loading."""
        return tuple(self._files)

    def _add_installed(self, point: EntryPoint) -> None:
        version = version_of(point)
        source = f"package {package_of(point)} {version}".strip()
        label = f"plugin {point.value!r} ({source})"
        register_owner(point.module, label)
        try:
            self.add(load_entry_point(point, label), source=source, name=point.value, version=version)
        except UserError as error:
            raise UserError(error.message, f"{error.remedy}\n  {without(point, installed())}".lstrip()) from error

    def add_file(self, file: str | Path) -> None:
        """Load a plugin file; one that is loaded already is left as it is."""
        path = Path(os.path.realpath(os.path.expanduser(file))) if path_problem(file) is None else Path(file)
        if path not in self._files:
            register_owner(module_name(path), f"plugin {path.stem!r} ({path})")
            module = import_file(path)
            self.add(module, source=str(path), name=path.stem, version=str(vars(module).get("__version__", "")))
            self._files.append(path)

    def add(self, plugin: object, *, source: str, name: str, version: str = "") -> None:
        """Register `plugin` (a module or an object with hook implementations) and all the classes it offers.

        One that is refused leaves nothing behind.
        """
        label = f"plugin {name!r} ({source})"
        _check_hook_names(plugin, label)
        hooks = attributed_hooks(plugin, label)
        if not vars(hooks):
            raise UserError(
                f"{label} implements no hook, so it adds nothing.",
                "decorate a function with @distill.hookimpl, as `@hookimpl def register_methods(): return [MyMethod]`.",
            )
        own_name = f"{name} [{source}]" if name in self._loaded else name
        try:
            self._manager.register(hooks, name=own_name)
            self._manager.check_pending()
            offered = self._offers(hooks, Provenance("", "", source, own_name, version), label)
            recipes = self._offered_recipes(hooks, Provenance("recipe", "", source, own_name, version), label)
        except DistillError:
            self._manager.unregister(hooks)
            raise
        except pluggy.PluginValidationError as error:
            if self._manager.get_name(hooks):  # some versions of pluggy have withdrawn it themselves
                self._manager.unregister(hooks)
            raise UserError(f"{label}: {error}", _hook_remedy(str(error))) from error
        for found, provenance in offered:
            self._classes[provenance.kind][found.name] = (found, provenance)
            self._aliases[provenance.kind].update(dict.fromkeys(found.aliases, found.name))
        self._recipes |= recipes
        self._loaded[own_name] = Loaded(own_name, source, version, tuple(_hook_of(hooks, name) for name in vars(hooks)))
        trace_line(f"{label} is loaded")

    def _offers(self, hooks: SimpleNamespace, provenance: Provenance, label: str) -> list[tuple[type[Any], Provenance]]:
        """The classes that a plugin offers, checked, with where each comes from."""
        offered: list[tuple[type[Any], Provenance]] = []
        for kind, hook in HOOKS.items():
            taken: dict[str, str] = {}
            for found in self._returned(hooks, hook, label):
                _check_class(kind, found, label)
                for name in (found.name, *found.aliases):
                    holder = self._holder(kind, name)
                    claimed = self._where(holder) if holder else taken.get(name)
                    if claimed is not None:
                        raise UserError(
                            f"two plugins claim the {_spoken(kind)} {name!r}: {claimed} and {label}.",
                            "rename one of them, or load only one.",
                        )
                    taken[name] = f"class {found.__name__} of {label}"
                offered.append((found, replace(provenance, kind=kind, name=found.name)))
        return offered

    def _offered_recipes(
        self, hooks: SimpleNamespace, provenance: Provenance, label: str
    ) -> dict[str, tuple[Path, Provenance]]:
        """The recipes that a plugin offers, by name, with where each comes from."""
        found: dict[str, tuple[Path, Provenance]] = {}
        for file in self._returned(hooks, "register_recipes", label):
            path = Path(file)
            if not path.is_file():
                raise UserError(f"{label}: register_recipes names {path}, which is no file.", "return paths of files.")
            holder = self._recipes.get(path.stem)
            if holder is not None or path.stem in found:
                other = self._where(holder[1]) if holder else f"{found[path.stem][0].name} of {label}"
                raise UserError(
                    f"two plugins claim the recipe {path.stem!r}: {other} and {label}.",
                    "rename one of the files, or load only one.",
                )
            found[path.stem] = path, replace(provenance, name=path.stem)
        return found

    @property
    def recipes(self) -> Mapping[str, tuple[Path, Provenance]]:
        """Published settings by name: the file, and where it comes from."""
        return dict(sorted(self._recipes.items()))

    def _returned(self, hooks: SimpleNamespace, hook: str, label: str) -> Iterator[Any]:
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            if implementation.plugin is hooks:
                try:
                    offered = implementation.function()
                except PluginError as error:  # it is the plugin that cannot be used, and nothing has run yet
                    raise UserError(f"{error}.", "mend the plugin.") from error.__cause__
                if not isinstance(offered, list | tuple):
                    raise UserError(
                        f"{label}: {hook} returned {type(offered).__name__}, not a list.",
                        f"write `def {hook}(): return [{'Path(...)' if hook == 'register_recipes' else 'MyClass'}]`.",
                    )
                yield from offered

    def _holder(self, kind: str, name: str) -> Provenance | None:
        entry = self._classes[kind].get(self._aliases[kind].get(name, name))
        return entry[1] if entry else None

    @staticmethod
    def _where(provenance: Provenance) -> str:
        return f"plugin {provenance.plugin!r} ({provenance.source})"

    def names(self, kind: str) -> list[str]:
        """Registered names of a kind, sorted, without aliases."""
        return sorted(self._classes[kind])

    def known(self, kind: str, name: str) -> bool:
        """Return whether `name` (or an alias of that spelling) is registered."""
        return self._holder(kind, name) is not None

    def get(self, kind: str, name: str) -> type[Any]:
        """The class registered as `name`. Raises UserError with the nearest names for an unknown one."""
        return self._entry(kind, name)[0]

    def provenance(self, kind: str, name: str) -> Provenance:
        """Where `name` comes from. Raises UserError for an unknown one."""
        return self._entry(kind, name)[1]

    def _entry(self, kind: str, name: str) -> tuple[type[Any], Provenance]:
        if kind not in self._classes:
            raise KeyError(f"kinds are {', '.join(KINDS)}, not {kind!r}")
        entry = self._classes[kind].get(self._aliases[kind].get(name, name))
        if entry is None:
            raise UserError(f"there is no {_spoken(kind)} {name!r}.", self.remedy(kind, name))
        return entry

    def remedy(self, kind: str, name: str) -> str:
        """Return the remedy for an unknown name: the nearest ones, all of them, and where others come from."""
        candidates = [*self.names(kind), *self._aliases[kind]]
        accepted = ", ".join(self.names(kind)) or "none"
        return f"{did_you_mean(name, candidates)}registered: {accepted}. A plugin adds others: --plugin FILE."


def _spoken(kind: str) -> str:
    return kind.replace("_", " ")


def _own_version() -> str:
    return import_module(ROOT).__version__


def hook_names() -> list[str]:
    """Names of all hooks, in the order of the specifications."""
    return [name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")]


def _check_hook_names(plugin: object, label: str) -> None:
    """Refuse implementations of hooks that do not exist, and functions of a hook's name that lack the decorator."""
    specified = hook_names()
    for name in dir(plugin):
        value = inspect.getattr_static(plugin, name)
        options = getattr(value, MARKER, None)
        hook = (options or {}).get("specname") or name
        if options is not None and hook not in specified:
            remedy = f"{did_you_mean(hook, specified)}hooks: {', '.join(specified)}."
            raise UserError(f"{label}: there is no hook {hook!r}.", remedy)
        if options is None and name in specified and inspect.isfunction(value):
            raise UserError(f"{label}: {name} is not decorated, so it would never be called.", "add @distill.hookimpl.")


def _hook_of(hooks: SimpleNamespace, name: str) -> str:
    return getattr(getattr(hooks, name), MARKER).get("specname") or name


def _hook_remedy(message: str) -> str:
    specifications = {name: str(inspect.signature(getattr(hookspecs, name))) for name in hook_names()}
    named = [f"{name}{signature}" for name, signature in specifications.items() if repr(name) in message]
    return f"the hook is `{named[0]}`; leave out what you do not need." if named else "see `docs/hooks.md`."


def _check_class(kind: str, found: Any, label: str) -> None:
    base = BASES[kind]
    if not isinstance(found, type) or not issubclass(found, base):
        raise UserError(f"{label}: {found!r} is not a class derived from distill.{base.__name__}.", "derive it.")
    name = getattr(found, "name", None)
    if not isinstance(name, str) or not name:
        raise UserError(f"{label}: class {found.__name__} has no name.", 'add `name = "..."` to the class.')
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(
            f"{label}: {_spoken(kind)} {name!r} does not define {missing}.", f"see distill.{base.__name__}."
        )
    config = getattr(found, "Config", None)
    strict = isinstance(config, type) and issubclass(config, BaseModel) and config.model_config.get("extra") == "forbid"
    if not strict:
        raise UserError(
            f"{label}: Config of {_spoken(kind)} {name!r} must be a pydantic model that refuses unknown keys.",
            f"derive it: `class Config({base.__name__}.Config)`.",
        )
