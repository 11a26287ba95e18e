"""Preparation of raw values for validation: numbers written as text, paths relative to their file."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel

from ..settings.types import Anywhere, Relative, is_url
from ..utils.files import path_problem


@dataclass(frozen=True)
class Leaf:
    """A scalar type, literal value or model that an annotation admits."""

    part: Any
    marked: Relative | None = None
    """Its mark as a path or hub id, or as a path or URL."""
    inside: bool = False
    """Whether it is admitted as an element of a list rather than as the value itself."""


def leaves(annotation: Any, metadata: tuple[Any, ...] = (), *, inside: bool = False) -> Iterator[Leaf]:
    """Yield everything that an annotation admits."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from leaves(arguments[0], (*metadata, *arguments[1:]), inside=inside)
    elif origin is Literal:
        yield from (Leaf(value, inside=inside) for value in arguments)
    elif origin in (Union, types.UnionType):
        for part in arguments:
            yield from leaves(part, metadata, inside=inside)
    elif origin is not None:
        for part in arguments:
            if part is not Ellipsis:
                yield from leaves(part, inside=True)
    else:
        yield Leaf(annotation, next((item for item in metadata if isinstance(item, Relative)), None), inside)


class LocalText(str):
    """The text of a path on this machine, in a field that takes hub ids or URLs too."""


class UrlText(str):
    """A URL, in a field that takes paths too."""


def url_problem(url: str) -> str | None:
    """Return what keeps a text from being a URL, though it begins as one."""
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        return f"is not a URL: {error}"
    return None


def is_local(text: str) -> bool:
    """Return whether a model's name is meant as a path rather than as a hub id."""
    return text.startswith(("/", "./", "../", "~", "\\")) or text.endswith((".safetensors", ".ckpt", ".bin"))


def absolute(text: str, base: Path) -> Path:
    """Return a path as it is meant in a file of the folder `base`."""
    return Path(os.path.normpath(os.path.join(base, os.path.expanduser(text))))


def adapt_text(text: str, admitted: set[Any], *, marked: Relative | None, base: Path) -> Any:
    """Convert a text for a field that may want a path, a number, a truth value or nothing."""
    if isinstance(marked, Anywhere):
        return UrlText(text) if is_url(text) else LocalText(absolute(text, base))
    if marked:
        path = absolute(text, base)
        return LocalText(path) if is_local(text) or os.path.exists(path) else text
    if Path in admitted:
        return absolute(text, base)
    if str in admitted:
        return text
    if text.strip().lower() in ("none", "null") and type(None) in admitted and "none" not in admitted:
        return None
    if int in admitted and float not in admitted:
        return _whole(text)
    return text


def _whole(text: str) -> Any:
    """Convert ``"1e4"`` to 10000; a text that is not a whole number stays as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if math.isfinite(number) and number == int(number) else text


def problem_of(value: Any, admitted: set[Any]) -> str | None:
    """Return what is wrong with a value that pydantic would accept: a truth value as a number, or a number that is not
    finite.
    """
    numeric = bool(admitted & {int, float})
    if isinstance(value, bool) and numeric and bool not in admitted and str not in admitted:
        return "is a truth value where a number is expected"
    number = value
    if isinstance(value, str) and numeric and str not in admitted:
        try:
            number = float(value)
        except ValueError:
            return None
    if isinstance(number, float) and not math.isfinite(number):
        return "is not a finite number"
    return None


@dataclass(frozen=True)
class Refused:
    """A value that is refused before pydantic sees it."""

    model: type[BaseModel]
    """The innermost model that it is for."""
    path: str
    """The dotted path of that model's values inside the part, with its dot."""
    key: str
    value: Any
    problem: str
    of_type: bool = True
    """Whether the message is to say which type the field wants."""


def prepare(
    model: type[BaseModel], raw: Mapping[str, Any], base: Callable[[str], Path], *, path: str = ""
) -> tuple[dict[str, Any], list[Refused]]:
    """Return the values of `raw` prepared for `model`, and those that are refused already.

    Args:
        model: Its fields say which types are wanted.
        raw: Values as read from the files.
        base: Returns the folder that relative paths of a key are relative to.
        path: Dotted path of `raw` inside its part, with its dot.
    """
    ready: dict[str, Any] = {}
    refused: list[Refused] = []
    for key, value in raw.items():
        info = model.model_fields.get(key)
        if info is None:
            ready[key] = value
            continue
        parts = list(leaves(info.annotation, tuple(info.metadata)))
        problem = _first_problem(value, _admitted(parts))
        if problem:
            refused.append(Refused(model, path, key, value, problem))
            continue
        inner: list[Refused] = []
        ready[key] = _adapt(value, parts, base(key), path=f"{path}{key}", refused=inner)
        problem = _place_problem(ready[key])
        if problem:
            refused.append(Refused(model, path, key, value, problem, of_type=False))
            del ready[key]
        refused += inner
    return ready, refused


def _place_problem(value: Any) -> str | None:
    """Return what keeps a path or an address, or one of several, from being one."""
    for item in value if isinstance(value, list) else [value]:
        problem = path_problem(item) if isinstance(item, Path | LocalText) else None
        problem = url_problem(item) if isinstance(item, UrlText) else problem
        if problem is not None:
            return problem
    return None


def _admitted(parts: Sequence[Leaf]) -> set[Any]:
    return {leaf.part for leaf in parts if leaf.part.__hash__ is not None}


def _first_problem(value: Any, admitted: set[Any]) -> str | None:
    for item in value if isinstance(value, list) else [value]:
        problem = problem_of(item, admitted)
        if problem:
            return problem
    return None


def _adapt(value: Any, parts: Sequence[Leaf], base: Path, *, path: str, refused: list[Refused]) -> Any:
    if isinstance(value, list):
        elements = [replace(leaf, inside=False) for leaf in parts if leaf.inside] or parts
        return [
            _adapt(item, elements, base, path=f"{path}.{index}", refused=refused) for index, item in enumerate(value)
        ]
    admitted = _admitted(parts)
    if isinstance(value, Mapping):
        models = [leaf for leaf in parts if isinstance(leaf.part, type) and issubclass(leaf.part, BaseModel)]
        if len(models) != 1:
            return value
        if models[0].inside:  # an object of such models by name
            one = [replace(models[0], inside=False)]
            return {
                name: _adapt(item, one, base, path=f"{path}.{name}", refused=refused) for name, item in value.items()
            }
        ready, problems = prepare(models[0].part, value, lambda _: base, path=f"{path}.")
        refused += problems
        return ready
    if value is False and "no" in admitted and bool not in admitted:
        return "no"  # YAML reads a bare `no` as false
    if isinstance(value, str):
        outside = [leaf for leaf in parts if not leaf.inside and leaf.part is not type(None)] or parts
        optional = {type(None)} & admitted
        marked = next((leaf.marked for leaf in outside if leaf.marked), None)
        return adapt_text(value, _admitted(outside) | optional, marked=marked, base=base)
    return value
