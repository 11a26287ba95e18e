"""Raw values made ready for validation: numbers written as text, paths relative to their file."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from .types import Relative


def leaves(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, bool]]:
    """Every scalar type, literal value or model that an annotation admits, and whether it is marked as a path or hub id."""
    marked = any(isinstance(item, Relative) for item in metadata)
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        yield from leaves(inner, (*metadata, *extra))
    elif origin is Literal:
        yield from ((value, False) for value in get_args(annotation))
    elif origin in (Union, types.UnionType) or origin is not None:
        for part in get_args(annotation):
            if part is not Ellipsis:
                yield from leaves(part, metadata if origin in (Union, types.UnionType) else ())
    else:
        yield annotation, marked


def is_local(text: str) -> bool:
    """Whether a model's name is meant as a path rather than as a hub id."""
    return text.startswith(("/", "./", "../", "~", "\\")) or text.endswith((".safetensors", ".ckpt", ".bin"))


def absolute(text: str, base: Path) -> Path:
    """A path as it is meant in a file of the folder `base`."""
    return Path(os.path.normpath(Path(base, Path(text).expanduser())))


def adapt_text(text: str, admitted: set[Any], *, marked: bool, base: Path) -> Any:
    """A text for a field that may want a path, a number, a truth value or nothing."""
    if marked:
        path = absolute(text, base)
        return str(path) if is_local(text) or path.exists() else text
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
    """``"1e4"`` as 10000; anything that is no whole number stays as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if math.isfinite(number) and number == int(number) else text


def problem_of(value: Any, admitted: set[Any]) -> str | None:
    """What pydantic would let through: truth values as numbers, numbers that are not finite."""
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


def prepare(
    model: type[BaseModel], raw: Mapping[str, Any], base: Callable[[str], Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of `raw` for `model`, and key -> problem for those that are refused already.

    Args:
        model: Whose fields say what is wanted.
        raw: As read from the files.
        base: The folder that relative paths of a key are relative to.
    """
    ready: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for key, value in raw.items():
        info = model.model_fields.get(key)
        if info is None:
            ready[key] = value
            continue
        parts = list(leaves(info.annotation, tuple(info.metadata)))
        problem = _first_problem(value, {part for part, _ in parts if _hashable(part)})
        if problem:
            problems[key] = problem
            continue
        ready[key] = _adapt(value, parts, base(key))
    return ready, problems


def _hashable(part: Any) -> bool:
    return part.__hash__ is not None


def _first_problem(value: Any, admitted: set[Any]) -> str | None:
    for item in value if isinstance(value, list) else [value]:
        problem = problem_of(item, admitted)
        if problem:
            return problem
    return None


def _adapt(value: Any, parts: list[tuple[Any, bool]], base: Path) -> Any:
    if isinstance(value, list):
        return [_adapt(item, parts, base) for item in value]
    admitted = {part for part, _ in parts if _hashable(part)}
    if isinstance(value, Mapping):
        models = [part for part in admitted if isinstance(part, type) and issubclass(part, BaseModel)]
        return prepare(models[0], value, lambda _: base)[0] if len(models) == 1 else value
    if value is False and "no" in admitted and bool not in admitted:
        return "no"  # YAML reads a bare `no` as false
    if isinstance(value, str):
        return adapt_text(value, admitted, marked=any(marked for _, marked in parts), base=base)
    return value
