"""Reading of configuration files: JSON, YAML and TOML as plain values, within limits that are met quickly."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import Finding
from ..utils.files import file_problem

SUFFIXES = (".json", ".yaml", ".yml", ".toml")
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
"""Objects and lists inside each other."""
MAX_VALUES = 1_000_000
"""Values of a YAML file, each alias counted as what it stands for."""
MAX_DIGITS = 100
"""Digits of a whole number: no key takes a larger one, and converting millions of digits takes minutes."""
_TOO_DEEP = f"nests more than {MAX_DEPTH} objects and lists"
_FLATTEN = "write it with fewer levels"
_TOML_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
_DEEP_TOML_KEY = re.compile(rf"(?<![\w-])(?:{_TOML_PART}){{{MAX_DEPTH}}}")
_MANY_DIGITS = re.compile(rf"[+-]?\d[\d_]{{{MAX_DIGITS},}}+")


class Unreadable(Exception):
    """The error of a file or a value that is refused before any key is looked at.

    Args:
        place: Its key, or the line in the file.
        value: The value at fault, or the line.
        problem: What is wrong with it.
        remedy: How to mend it.
        is_syntax: Whether it is no value of its format at all, rather than one that is refused.
    """

    def __init__(self, place: str, value: object, problem: str, remedy: str, *, is_syntax: bool = False) -> None:
        super().__init__(f"{place}: {problem}")
        self.place, self.value, self.problem, self.remedy = place, value, problem, remedy
        self.is_syntax = is_syntax

    def finding(self, file: str, key: str | None = None) -> Finding:
        """Return it as a finding about `file`; `key` stands for the place."""
        return Finding(file, self.place if key is None else key, self.value, self.problem, self.remedy)


def read_file(path: Path, findings: list[Finding], *, what: str) -> Any:
    """Return the content of a JSON, YAML or TOML file, or None with findings.

    Args:
        path: The file.
        findings: Takes what is wrong with the file, its syntax or single values.
        what: The option or key that names the file.
    """
    try:
        content = _parse(_text(path, what), path.suffix.lower())
    except Unreadable as error:
        findings.append(error.finding(str(path)))
        return None
    problems = list(unusable(content))
    findings.extend(problem.finding(str(path)) for problem in problems)
    return None if problems else content


def _text(path: Path, what: str) -> str:
    give = f"give the path of a {'/'.join(SUFFIXES)} file; `distill config init` writes one"
    problem = file_problem(path)
    if problem is not None:
        raise Unreadable(what, str(path), problem, give)
    if path.suffix.lower() not in SUFFIXES:
        problem = f"has the suffix {path.suffix!r}; {', '.join(SUFFIXES)} are read"
        raise Unreadable(what, str(path), problem, "rename or convert it")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise Unreadable(what, str(path), f"cannot be read: {error.strerror}", give) from error
    if len(content) > MAX_BYTES:
        problem = f"has more than {MAX_BYTES // 2**20} MiB, which is no configuration"
        raise Unreadable(what, str(path), problem, "keep long lists in files of their own, as prompts_file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise Unreadable("file", path.name, problem, "save it as UTF-8") from error


def _parse(text: str, suffix: str) -> Any:
    try:
        return {".json": parse_json, ".toml": _parse_toml}.get(suffix, _parse_yaml)(text)
    except RecursionError as error:
        raise Unreadable("file", "", _TOO_DEEP, _FLATTEN) from error


# -- JSON and TOML ----------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises Unreadable."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        place, line = f"line {error.lineno}, column {error.colno}", _line(error.doc, error.lineno)
        problem, remedy = f"is not JSON: {error.msg}", "check commas and quotes around it"
        raise Unreadable(place, line, problem, remedy, is_syntax=True) from error


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise Unreadable(key, key, "stands twice in one object", "keep one of the two")
        result[key] = value
    return result


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _too_long(text, "file")
    return int(text)


def _too_long(text: str, place: str) -> Unreadable:
    problem = f"is a number of {len(text):,} digits, and no key takes more than {MAX_DIGITS}"
    return Unreadable(place, f"{text[:20]}...", problem, "give a smaller number")


def _parse_toml(text: str) -> Any:
    if _DEEP_TOML_KEY.search(text):  # tomllib needs time quadratic in the length of a dotted key
        raise Unreadable("file", "", _TOO_DEEP, _FLATTEN)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem, remedy = f"is not TOML: {error}", "check the line that the message names"
        raise Unreadable("file", _line(text, 1), problem, remedy) from error
    except ValueError as error:  # Python converts no more than 4300 digits
        digits = _MANY_DIGITS.search(text)
        if digits:
            raise _too_long(digits[0], "file") from error
        raise


# -- YAML -------------------------------------------------------------------------------------------------------------

_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
"""The tags of values that JSON has as well: all others are refused."""
_AS_TEXT = (f"{_TAG}timestamp", f"{_TAG}value")
"""What a bare word may be in YAML 1.1, and is a text here: dates (`2024-05-01` names runs), and ``=``."""


class _PlainLoader(_FastLoader):
    """A loader of what JSON can express, with merge keys; a key that stands twice is refused."""

    yaml_constructors = {  # noqa: RUF012 - yaml's own table
        tag: constructor
        for tag, constructor in _FastLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _PLAIN
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _AS_TEXT]
        for letter, resolvers in _FastLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; one that its tag cannot be read from is an error of its line."""
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}int" and len(node.value) > MAX_DIGITS:
            raise _too_long(node.value, _place(node.start_mark))
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            tag = node.tag.removeprefix(_TAG)
            problem = f"cannot be read as {tag!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[str, Any]:
    """Return an object; keys that a merge (``<<``) brings give way to its own."""
    _unique([(_key(key), None) for key, _ in node.value if key.tag != _MERGE])
    loader.flatten_mapping(node)
    return {_key(key): loader.construct_object(value, deep=True) for key, value in node.value}


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "a key must be a text", node.start_mark)
    return node.value


_PlainLoader.add_constructor(f"{_TAG}map", _mapping)


def _parse_yaml(text: str) -> Any:
    try:
        _measure(yaml.parse(text, Loader=_FastLoader))
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or error)
        tagged = "determine a constructor" in problem or "cannot be read as" in problem
        remedy = "leave out the tag, or quote the text" if tagged else "check indentation and colons around it"
        place = _place(mark) if mark else "file"
        line = _line(text, mark.line + 1) if mark else ""
        raise Unreadable(place, line, f"is not YAML: {problem}", remedy) from error


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


@dataclass
class _Extent:
    """The size of a value while its events are read: values inside it, levels below it."""

    anchor: str | None
    values: int = 1
    levels: int = 1

    def add(self, inner: _Extent) -> None:
        self.values += inner.values
        self.levels = max(self.levels, inner.levels + 1)


def _measure(events: Iterator[yaml.Event]) -> None:
    """Refuse a file whose values, aliases written out, would be too many or too deep, before any is built."""
    known: dict[str, _Extent] = {}
    around: list[_Extent] = [_Extent(None)]
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            around.append(_Extent(event.anchor))
            extent = _Extent(None, values=0)
        elif isinstance(event, yaml.CollectionEndEvent):
            extent = around.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in {outer.anchor for outer in around}:
                problem = f"the alias *{event.anchor} stands inside what it names"
                raise Unreadable(_place(event.start_mark), f"*{event.anchor}", problem, "write the value out")
            extent = known.get(event.anchor, _Extent(None))
        else:
            extent = _Extent(getattr(event, "anchor", None))
        if extent.anchor is not None:
            known[extent.anchor] = extent
        around[-1].add(extent)
        if len(around) + extent.levels > MAX_DEPTH + 2:
            raise Unreadable(_place(event.start_mark), "", _TOO_DEEP, _FLATTEN)
        if around[-1].values > MAX_VALUES:
            problem = f"stands for more than {MAX_VALUES:,} values, aliases written out"
            raise Unreadable(_place(event.start_mark), "", problem, "keep long lists in files of their own")


# -- single values ----------------------------------------------------------------------------------------------------


def unusable(content: Any, key: str = "") -> Iterator[Unreadable]:
    """Yield what no key of a configuration can use, whichever it is: the first ten.

    Args:
        content: A value with all that is inside it.
        key: Its dotted path.
    """
    waiting, found = [(key, content, 0)], 0
    while waiting and found < 10:
        place, value, depth = waiting.pop()
        problem = _problem(value, depth)
        if problem is not None:
            found += 1
            yield Unreadable(place or "file", _shortened(value), *problem)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                path = f"{place}.{name}".strip(".")
                waiting += [(path, inner, depth + 1)]
                if _problem(name, 0) is not None:
                    waiting.append((path, name, 0))
        elif isinstance(value, list | tuple):
            waiting += [(f"{place}[{index}]", inner, depth + 1) for index, inner in enumerate(value)]


def _problem(value: Any, depth: int) -> tuple[str, str] | None:
    if depth > MAX_DEPTH:
        return _TOO_DEEP, _FLATTEN
    if isinstance(value, str | Path):
        return text_problem(str(value))
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        return f"is a number of more than {MAX_DIGITS} digits", "give a smaller number"
    if value is None or isinstance(value, int | float | Mapping | list | tuple):
        return None
    return f"is a {type(value).__name__}, and no key takes one", "write it in quotes, as a text"


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text inside a value, with its dotted path."""
    if isinstance(value, str):
        yield key, value
    named = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in named:
        yield from texts(inner, f"{key}.{name}".strip("."))


def text_problem(text: str) -> tuple[str, str] | None:
    """Return what keeps a text from being written to files, and the remedy; None where nothing does."""
    if "\0" in text:
        return "holds a NUL character", "take it out"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a character (a lone surrogate, or bytes that are not UTF-8)", "write it as UTF-8"
    return None


def _shortened(value: Any) -> object:
    """Return a value as a message can show it, whatever is inside it."""
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        return f"a number of about {math.ceil(value.bit_length() * math.log10(2)):,} digits"
    if isinstance(value, Mapping | list | tuple):
        return "..."
    return value
