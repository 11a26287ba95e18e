"""The registry: one plugin manager per run, and every name that plugins add to it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args

import pluggy
from pydantic import BaseModel

from . import hookspecs
from .backend import DataBackend
from .errors import DistillError, PluginError, UserError
from .evaluator import Evaluator
from .family import ModelFamily
from .method import Method
from .names import nearest
from .optimizer import OptimizerPlugin
from .publisher import Publisher
from .quantizer import Quantizer
from .tracker import Tracker

Kind = Literal["method", "family", "data_backend", "tracker", "optimizer", "quantizer", "evaluator", "publisher"]
KINDS: tuple[str, ...] = get_args(Kind)
ENTRY_POINTS = "distill.plugins"
BUILT_IN_PACKAGES = ("distill_methods", "model_families", "data_backends", "plugins")

_BASES: Mapping[str, type] = {
    "method": Method,
    "family": ModelFamily,
    "data_backend": DataBackend,
    "tracker": Tracker,
    "optimizer": OptimizerPlugin,
    "quantizer": Quantizer,
    "evaluator": Evaluator,
    "publisher": Publisher,
}
_HOOKS: Mapping[str, str] = {
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


class Registry:
    """Names of every kind, resolved to classes, and the hooks of all plugins."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._classes: dict[str, dict[str, tuple[type[Any], Provenance]]] = {kind: {} for kind in KINDS}
        self._aliases: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        self._sources: dict[str, str] = {}
        self._files: list[Path] = []

    @classmethod
    def load(cls, files: Iterable[str | Path] = (), *, installed: bool = True) -> Registry:
        """Everything built in, the installed packages' entry points, and the plugin files named.

        Raises:
            UserError: A plugin cannot be used as it is: missing, failing at import, misspelt hook, name clash.
        """
        registry = cls()
        for module in _built_in_modules():
            registry.add(module, source="built in", name=module.__name__)
        if installed:
            for point in entry_points(group=ENTRY_POINTS):
                version = f" {point.dist.version}" if point.dist else ""
                source = f"package {point.dist.name if point.dist else point.value}{version}"
                registry.add(_load_entry_point(point, source), source=source, name=point.value)
        for file in files:
            registry.add_file(file)
        return registry

    @property
    def hook(self) -> pluggy.HookRelay:
        """Calls a hook of every plugin, by keyword; a failing plugin raises PluginError that names it."""
        return self._manager.hook

    @property
    def sources(self) -> Mapping[str, str]:
        """Plugin name -> where it comes from, in the order of loading."""
        return dict(self._sources)

    @property
    def files(self) -> tuple[Path, ...]:
        """Plugin files, in the order of loading."""
        return tuple(self._files)

    def add_file(self, file: str | Path) -> None:
        """Load a plugin file; one that is loaded already is left as it is."""
        path = Path(file).expanduser().resolve()
        if path not in self._files:
            self.add(_import_file(path), source=str(path), name=path.stem)
            self._files.append(path)

    def add(self, plugin: object, *, source: str, name: str) -> None:
        """Register `plugin` (a module or an object with hook implementations) and all the classes it offers."""
        label = f"plugin {name!r} ({source})"
        _check_hook_names(plugin, label)
        attributed = _attributed_hooks(plugin, label)
        try:
            registered = self._manager.register(
                attributed, name=f"{name} [{source}]" if name in self._sources else name
            )
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise UserError(f"{label}: {error}", _hook_remedy(str(error))) from error
        plugin_name = registered or name
        if not self._manager.get_hookcallers(attributed):
            raise UserError(
                f"{label} implements no hook, so it adds nothing.",
                "decorate a function with @distill.hookimpl, as `@hookimpl def register_methods(): return [MyMethod]`.",
            )
        self._sources[plugin_name] = source
        for kind, hook in _HOOKS.items():
            for found in self._offered(attributed, hook, label):
                self._add_class(kind, found, Provenance(kind, getattr(found, "name", ""), source, plugin_name), label)

    def _offered(self, plugin: object, hook: str, label: str) -> Iterator[type[Any]]:
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            if implementation.plugin is plugin:
                offered = implementation.function()
                if not isinstance(offered, list | tuple):
                    raise UserError(
                        f"{label}: {hook} returned {type(offered).__name__}, not a list of classes.",
                        f"write `def {hook}(): return [MyClass]`.",
                    )
                yield from offered

    def _add_class(self, kind: str, found: type[Any], provenance: Provenance, label: str) -> None:
        _check_class(kind, found, label)
        for name in (found.name, *getattr(found, "aliases", ())):
            holder = self._holder(kind, name)
            if holder is not None:
                raise UserError(
                    f"two plugins claim the {_spoken(kind)} {name!r}: {self._where(holder)} and {label}.",
                    "rename one of them, or load only one.",
                )
        self._classes[kind][found.name] = (found, provenance)
        self._aliases[kind].update(dict.fromkeys(getattr(found, "aliases", ()), found.name))

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
        """Whether `name` (or an alias of that spelling) is registered."""
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
        """What to do about an unknown name: the nearest ones, all of them, and where others come from."""
        candidates = [*self.names(kind), *self._aliases[kind]]
        close = nearest(name, candidates)
        hint = f"did you mean {close!r}? " if close else ""
        accepted = ", ".join(self.names(kind)) or "none"
        return f"{hint}registered: {accepted}. A plugin adds others: --plugin FILE."


def _spoken(kind: str) -> str:
    return kind.replace("_", " ")


def _built_in_modules() -> Iterator[ModuleType]:
    root = __name__.rsplit(".", 2)[0]
    for package_name in BUILT_IN_PACKAGES:
        package = importlib.import_module(f"{root}.{package_name}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
            if info.name.startswith("_"):
                continue
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            if any(hasattr(value, f"{hookspecs.PROJECT}_impl") for value in vars(module).values()):
                yield module


def _load_entry_point(point: Any, source: str) -> object:
    try:
        return point.load()
    except Exception as error:
        raise UserError(
            f"plugin {point.value!r} ({source}) cannot be imported: {type(error).__name__}: {error}.",
            f"mend or uninstall {source}.",
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"plugin file {path} does not exist.", "give --plugin the path of a Python file.")
    name = f"distill_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin file {path} is not a Python file.", "plugin files end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = _line_in(error, path)
        raise UserError(
            f"plugin file {path} cannot be imported{line}: {type(error).__name__}: {error}.",
            "mend the file; `python FILE` shows the same error.",
        ) from error
    return module


def _line_in(error: Exception, path: Path) -> str:
    """``, line N`` of the deepest frame of `error` inside `path`."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f" (line {line})" if line else ""


def hook_names() -> list[str]:
    """Names of all hooks, in the order of the specifications."""
    return [name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")]


def _check_hook_names(plugin: object, label: str) -> None:
    """Refuse implementations of hooks that do not exist, and functions of a hook's name that lack the decorator."""
    specified = hook_names()
    marker = f"{hookspecs.PROJECT}_impl"
    for name in dir(plugin):
        value = inspect.getattr_static(plugin, name)
        options = getattr(value, marker, None)
        hook = (options or {}).get("specname") or name
        if options is not None and hook not in specified:
            close = nearest(hook, specified)
            remedy = f"did you mean {close!r}? " if close else ""
            raise UserError(f"{label}: there is no hook {hook!r}.", f"{remedy}hooks: {', '.join(specified)}.")
        if options is None and name in specified and inspect.isfunction(value):
            raise UserError(f"{label}: {name} is not decorated, so it would never be called.", "add @distill.hookimpl.")


def _hook_remedy(message: str) -> str:
    specifications = {name: str(inspect.signature(getattr(hookspecs, name))) for name in hook_names()}
    named = [f"{name}{signature}" for name, signature in specifications.items() if repr(name) in message]
    return f"the hook is `{named[0]}`; leave out what you do not need." if named else "see `docs/hooks.md`."


def _check_class(kind: str, found: Any, label: str) -> None:
    base = _BASES[kind]
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


def _attributed_hooks(plugin: object, label: str) -> SimpleNamespace:
    """The hook implementations of `plugin`, each reporting its failures with the plugin's name."""
    marker = f"{hookspecs.PROJECT}_impl"
    found = {name: getattr(plugin, name) for name in dir(plugin) if hasattr(getattr(plugin, name, None), marker)}
    result = SimpleNamespace()
    for name, function in found.items():
        options = getattr(function, marker)
        wraps = options.get("wrapper") or options.get("hookwrapper")
        setattr(result, name, function if wraps else _attributed(function, label, options.get("specname") or name))
    return result


def _attributed(function: Callable[..., Any], label: str, hook: str) -> Callable[..., Any]:
    """`function`, whose failures are reported with the plugin's name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except DistillError:
            raise
        except Exception as error:
            raise PluginError(f"{label} failed in {hook}: {type(error).__name__}: {error}") from error

    return call
