"""Files and flags as layers of raw values, each value with its origin."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Finding
from ..settings.secrets import FromEnvironment
from ..utils.redaction import is_secret, remember
from .parsing import Unreadable, parse_json, text_problem, unusable

COMMAND_LINE = "command line"
MAX_KEYS = 16
"""Keys of one ``a.b.c=value``."""
_ENVIRONMENT = re.compile(r"\{env:([^}]*)\}")


@dataclass(frozen=True)
class Origin:
    """The file that a value comes from."""

    file: str
    """The file as findings show it."""
    base: Path
    """The folder that relative paths are relative to."""


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
        if isinstance(here, Mapping):  # only then is there anything deeper: a look at all, for each key, takes long
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
    unwritable = text_problem(filled)
    if unwritable is not None:
        findings.append(Finding(file, key, value, *unwritable))
        return value
    remember(key, filled, value)
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
    unwritable = text_problem(text)
    if unwritable is not None:
        findings.append(Finding(COMMAND_LINE, "--set", text, *unwritable))
        return None
    if not equals or not all(path) or len(path) > MAX_KEYS:
        problem = "is not KEY=VALUE" if len(path) <= MAX_KEYS else f"names {len(path):,} keys inside each other"
        findings.append(Finding(COMMAND_LINE, "--set", text, problem, "write it as --set learning_rate=2e-4"))
        return None
    try:
        parsed = _json_or_text(value)
    except Unreadable as error:
        findings.append(error.finding(COMMAND_LINE, ".".join(path)))
        return None
    problems = list(unusable(parsed, ".".join(path)))
    findings.extend(problem.finding(COMMAND_LINE) for problem in problems)
    return None if problems else (path, parsed)


def _json_or_text(text: str) -> Any:
    try:
        return parse_json(text)
    except RecursionError as error:
        raise Unreadable("", "", "nests too many objects and lists", "write it with fewer levels") from error
    except Unreadable as error:
        if error.is_syntax:
            return text
        raise


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Turn ``("a", "b"), c`` into ``{"a": {"b": c}}``."""
    for key in reversed(path):
        value = {key: value}
    return value
