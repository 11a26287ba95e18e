"""Checks of every plugin, whatever its kind: its name, its settings, its signatures, its imports."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from .checks import ConformanceError, NotApplicable, Subject, expect

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
LOADER = """
import importlib.util, sys
before = set(sys.modules)
name, file = sys.argv[1:]
if file:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
else:
    importlib.import_module(name)
print("\\n".join(sorted({each.partition(".")[0] for each in set(sys.modules) - before})))
"""


def name_is_usable(subject: Subject) -> None:
    """Check that the name can be written in configuration files, lists with commas and dotted paths."""
    for name in (subject.cls.name, *getattr(subject.cls, "aliases", ())):
        expect(
            isinstance(name, str) and NAME.fullmatch(name),
            f"the name {name!r} cannot be written in configurations",
            "use letters, digits, - and _ alone, beginning with a letter or digit",
        )


def it_is_described(subject: Subject) -> None:
    """Check that the class has a docstring: `distill plugins list` shows its first line."""
    own = vars(subject.cls).get("__doc__")
    expect(
        (own or "").strip(),
        f"class {subject.cls.__name__} has no docstring of its own",
        "say in a line what it is: `distill plugins list` shows it",
    )


def it_is_complete(subject: Subject, base: type[Any]) -> None:
    """Check that no abstract method is left."""
    missing = ", ".join(sorted(getattr(subject.cls, "__abstractmethods__", ())))
    expect(not missing, f"class {subject.cls.__name__} does not define {missing}", f"see distill.{base.__name__}")


# -- settings ---------------------------------------------------------------------------------------------------------


def config_refuses_unknown_keys(subject: Subject) -> None:
    """Check that a misspelt key is refused."""
    config = subject.cls.Config
    expect(
        isinstance(config, type) and issubclass(config, BaseModel),
        "Config is not a pydantic model",
        "derive it from the base class's: `class Config(distill.Method.Config)`",
    )
    expect(
        config.model_config.get("extra") == "forbid",
        f"Config accepts unknown keys (extra={config.model_config.get('extra')!r}), so that misspelt ones are ignored",
        'derive it from the base class\'s Config, or set model_config = ConfigDict(extra="forbid")',
    )


def config_is_described(subject: Subject) -> None:
    """Check that every field has a description: schema, documentation and messages are made from these."""
    bare = [key for key, info in subject.cls.Config.model_fields.items() if not (info.description or "").strip()]
    expect(
        not bare,
        f"Config has fields without a description: {', '.join(bare)}",
        "write a docstring with the unit below each field (with use_attribute_docstrings=True in model_config)",
    )


def config_has_a_schema(subject: Subject) -> None:
    """Check that the settings have a JSON Schema, by which editors check files."""
    try:
        subject.cls.Config.model_json_schema()
    except Exception as error:
        raise ConformanceError(
            f"Config has no JSON Schema: {error}; use types that JSON knows, or a type with a schema of its own"
        ) from error


def config_limits_its_numbers(subject: Subject) -> None:
    """Check that numbers have limits: without them a value that cannot work is found hours later."""
    from ..config.findings import expectation

    config = subject.cls.Config
    said = {key: expectation(config, key) for key in config.model_fields}
    free = [key for key, words in said.items() if "number" in words and not re.search("at least|above", words)]
    expect(
        not free,
        f"Config has numbers without a lower limit: {', '.join(free)}",
        "limit them: `scale: float = Field(1.0, ge=0)`",
    )


def config_accepts_its_defaults(subject: Subject) -> None:
    """Check that the defaults are valid, and come back from config.resolved.json as they were."""
    try:
        made = subject.cls.Config()
    except ValidationError as error:
        required = {key for key, info in subject.cls.Config.model_fields.items() if info.is_required()}
        if required or not subject.cls.Config.model_fields:
            raise NotApplicable(f"Config has no defaults for {', '.join(sorted(required))}") from error
        if all(item["type"] == "value_error" for item in error.errors()):
            raise NotApplicable(f"Config wants a choice: {error.errors()[0]['msg']}") from error
        raise ConformanceError(f"Config refuses its own defaults: {error}") from error
    dumped = made.model_dump(mode="json")
    try:
        again = subject.cls.Config.model_validate(dumped)
    except ValidationError as error:
        raise ConformanceError(f"Config refuses what it wrote itself, {dumped}: {error}") from error
    expect(again == made, f"Config({dumped}) is not what it was after a round trip through JSON", "mend its validators")


# -- signatures -------------------------------------------------------------------------------------------------------


def signatures_fit(subject: Subject, base: type[Any]) -> None:
    """Check that methods can be called by the argument names of the base class, as the engine does."""
    wrong = []
    parts = [part for part in reversed(base.__mro__) if part.__module__.startswith(base.__module__.rpartition(".")[0])]
    for name, declared in {name: value for part in parts for name, value in vars(part).items()}.items():
        if name.startswith("__") and name != "__init__":
            continue
        own = inspect.getattr_static(subject.cls, name)
        theirs, ours = _function(declared), _function(own)
        if theirs is not None and ours is None and not isinstance(own, property):
            wrong.append(f"{name} is not a function")
        elif theirs is not None and ours is not None and ours is not theirs:
            wrong += [f"{name}{inspect.signature(ours)}: {problem}" for problem in _misfits(theirs, ours)]
            if isinstance(declared, classmethod) != isinstance(own, classmethod):
                wrong.append(f"{name}: is {'no' if isinstance(declared, classmethod) else 'a'} classmethod")
    expect(not wrong, "; ".join(wrong), f"declare it as distill.{base.__name__} does")


def _function(value: Any) -> Any:
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return value if inspect.isfunction(value) else None


def _misfits(theirs: Any, ours: Any) -> list[str]:
    """Return reasons why a call that fits `theirs` does not fit `ours`."""
    declared, own = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
    kinds = {parameter.kind for parameter in own.values()}
    any_keyword, any_place = inspect.Parameter.VAR_KEYWORD in kinds, inspect.Parameter.VAR_POSITIONAL in kinds
    problems = [f"it lacks {name!r}" for name in declared if name not in own and not any_keyword and not any_place]
    for name, parameter in own.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind in (
            *POSITIONAL,
            inspect.Parameter.KEYWORD_ONLY,
        )
        if needed and name not in declared:
            problems.append(f"{name!r} is not given by the engine and has no default")
        if name in declared and needed and declared[name].default is not inspect.Parameter.empty:
            problems.append(f"{name!r} may be left out by the engine and has no default")
    return problems + _misplaced(declared, own)


def _misplaced(declared: Mapping[str, inspect.Parameter], own: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return positional parameters that are in another position."""
    positions = [name for name, parameter in declared.items() if parameter.kind in POSITIONAL]
    ours = [name for name, parameter in own.items() if parameter.kind in POSITIONAL]
    shared = [name for name in positions if name in own]
    return [
        f"{name!r} must be the {place + 1}th in order"
        for place, name in enumerate(shared)
        if name in declared and (place >= len(ours) or ours[place] != name)
    ]


# -- imports and state ------------------------------------------------------------------------------------------------


def packages_are_imported_late(subject: Subject) -> None:
    """Check that the plugin loads without its packages, so that it can say which are missing."""
    packages = getattr(subject.cls, "packages", {})
    if not packages:
        raise NotApplicable("it declares no packages")
    module = sys.modules[subject.cls.__module__]
    loaded, error = _imported_by(module.__name__, module.__file__ or "")
    expect(not error, f"its module cannot be imported by itself: {error}", "import its packages inside of functions")
    early = sorted(set(packages) & loaded)
    expect(
        not early,
        f"importing the plugin imports {', '.join(early)}",
        "import it inside of the functions that use it: the plugin must load where the package is missing",
    )


@cache
def _imported_by(name: str, file: str) -> tuple[frozenset[str], str]:
    """Return the top-level packages that a fresh interpreter has after importing the module, and its error message."""
    from importlib.util import find_spec

    importable = not name.startswith("distill_plugin_") and find_spec(name.partition(".")[0]) is not None
    command = [sys.executable, "-c", LOADER, name, "" if importable else file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = done.stderr.strip().splitlines()
    return frozenset(done.stdout.split()), said[-1] if done.returncode and said else ""


def class_is_left_alone(subject: Subject, base: type[Any], before: Mapping[str, Any]) -> None:
    """Check that the other checks did not change the class: two runs in one process must not affect each other."""
    from .checks import containers

    after = containers(subject.cls)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    expect(
        not changed,
        f"attributes of the class {subject.cls.__name__} were changed by its use: {', '.join(changed)}",
        "make them in __init__: what stands in the class is shared by all instances",
    )


def kind_of(cls: type[Any]) -> str:
    """Return the kind of plugin that a class is. Raises TypeError for none."""
    from ..registry.registry import BASES

    for kind, base in BASES.items():
        if isinstance(cls, type) and issubclass(cls, base):
            return kind
    names = ", ".join(f"distill.{base.__name__}" for base in BASES.values())
    raise TypeError(f"{cls!r} is derived from none of {names}")
