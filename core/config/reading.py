"""Files and flags as layers of raw values, each value with its origin."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import Finding
from ..settings.secrets import FromEnvironment, is_secret

COMMAND_LINE = "command line"
SUFFIXES = (".json", ".yaml", ".yml", ".toml")
_ENVIRONMENT = re.compile(r"\{env:([^}]*)\}")


@dataclass(frozen=True)
class Origin:
    """The file that a value comes from."""

    file: str
    """The file as findings show it."""
    base: Path
    """The folder that relative paths are relative to."""


class Repeated(Exception):
    """The error of a key that stands twice in one object."""


@dataclass
class Layers:
    """The raw values of several layers merged into one, later ones stronger, and the origin of each."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[tuple[str, ...], Origin] = field(default_factory=dict)
    fallback: Origin = field(default_factory=lambda: Origin(COMMAND_LINE, Path.cwd()))
    """The origin of keys that nobody gave: where they would have to be given."""

    def add(self, values: Mapping[str, Any], origin: Origin, *, deep: frozenset[str] = frozenset()) -> None:
        """Lay `values` over the present ones; objects under the keys `deep` are merged, all else is replaced."""
        for key, value in values.items():
            self._put((key,), self.values, value, origin, deep=key in deep)

    def _put(self, path: tuple[str, ...], into: dict[str, Any], value: Any, origin: Origin, *, deep: bool) -> None:
        here = into.get(path[-1])
        if deep and isinstance(here, dict) and isinstance(value, Mapping):
            for key, inner in value.items():
                self._put((*path, key), here, inner, origin, deep=True)
            return
        into[path[-1]] = dict(value) if isinstance(value, Mapping) else value
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = origin

    def origin(self, *path: str) -> Origin:
        """Return the origin of the value at `path`, or of what encloses it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        deeper = [origin for known, origin in self.origins.items() if known[: len(path)] == path]
        return deeper[0] if deeper else self.fallback

    def given(self, key: str) -> bool:
        """Return whether some layer gave the key a value that is not null."""
        return self.values.get(key) is not None


@dataclass
class ConfigReport:
    """Takes what is wrong and what should be known about the keys of one source: the run's, or a dataset's."""

    layers: Layers
    """Where the values come from."""
    findings: list[Finding]
    notices: list[str]
    prefix: str = ""
    """In front of the keys in messages, with its dot."""

    def refuse(self, key: str, value: object, problem: str, remedy: str) -> None:
        """Add a finding about a key, with the file that its value came from."""
        file = self.layers.origin(*key.split(".")).file
        self.findings.append(Finding(file, self.prefix + key, value, problem, remedy))

    def note(self, line: str) -> None:
        """Add a notice that begins with a key."""
        self.notices.append(self.prefix + line)


def read_file(path: Path, findings: list[Finding], *, what: str) -> Any:
    """Return the content of a JSON, YAML or TOML file, or None with a finding."""

    def refuse(key: str, value: object, problem: str, remedy: str) -> None:
        findings.append(Finding(str(path), key, value, problem, remedy))

    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        refuse(what, str(path), kind, f"give the path of a {'/'.join(SUFFIXES)} file; `distill config init` writes one")
        return None
    if path.suffix.lower() not in SUFFIXES:
        refuse(
            what, str(path), f"has the suffix {path.suffix!r}; {', '.join(SUFFIXES)} are read", "rename or convert it"
        )
        return None
    try:
        return _parse(path.read_text(encoding="utf-8-sig"), path.suffix.lower())
    except Repeated as error:
        refuse(str(error), str(error), "stands twice in one object", "keep one of the two")
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        refuse(place, _line(error.doc, error.lineno), f"is not JSON: {error.msg}", "check commas and quotes around it")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        refuse(place, getattr(error, "problem", str(error)), "is not YAML", "check indentation and colons around it")
    except tomllib.TOMLDecodeError as error:
        refuse("file", path.name, f"is not TOML: {error}", "check the line that the message names")
    except UnicodeDecodeError as error:
        refuse("file", path.name, f"is not UTF-8 text: {error.reason} at byte {error.start}", "save it as UTF-8")
    return None


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text, object_pairs_hook=_unique)
    if suffix == ".toml":
        return tomllib.loads(text)
    return yaml.load(text, Loader=_UniqueLoader)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise Repeated(key)
        result[key] = value
    return result


class _UniqueLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that stands twice."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    pairs = [
        (str(loader.construct_object(key, deep=True)), loader.construct_object(value, deep=True))
        for key, value in node.value
    ]
    return _unique(pairs)


_UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def fill_environment(value: Any, file: str, key: str, findings: list[Finding]) -> Any:
    """Return `value` with every ``{env:NAME}`` inside its texts replaced."""
    if isinstance(value, Mapping):
        return {
            name: fill_environment(inner, file, f"{key}.{name}".strip("."), findings) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [fill_environment(inner, file, f"{key}[{index}]", findings) for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in _ENVIRONMENT.findall(value):
        if name not in os.environ:
            problem = f"the environment variable {name} is not set"
            findings.append(Finding(file, key, value, problem, f"set it: export {name}=..., or write the value itself"))
    filled = _ENVIRONMENT.sub(lambda match: os.environ.get(match.group(1), match.group(0)), value)
    return FromEnvironment.fill(filled, value) if is_secret(key) and filled != value else filled


def strip_dashes(values: Mapping[str, Any], file: str, findings: list[Finding]) -> dict[str, Any]:
    """Remove the leading ``--`` of keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        plain = key.removeprefix("--")
        if plain in result:
            findings.append(
                Finding(file, key, value, f"is given twice, as {plain!r} and {key!r}", "keep one of the two")
            )
        result[plain] = value
    return result


def parse_override(text: str, findings: list[Finding]) -> tuple[tuple[str, ...], Any] | None:
    """Parse ``a.b=c`` into (("a", "b"), c), with c read as JSON where it is JSON, else as text."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.strip().removeprefix("--").split("."))
    if not equals or not all(path):
        problem = "is not KEY=VALUE"
        findings.append(Finding(COMMAND_LINE, "--set", text, problem, "write it as --set learning_rate=2e-4"))
        return None
    try:
        return path, json.loads(value)
    except json.JSONDecodeError:
        return path, value


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Turn ``("a", "b"), c`` into ``{"a": {"b": c}}``."""
    for key in reversed(path):
        value = {key: value}
    return value
