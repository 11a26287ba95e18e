"""Conversion of pydantic's errors to findings, which say how a mistake is mended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from ..errors import SHOWN_FINDINGS, Finding
from ..settings.secrets import shown
from ..utils.suggest import did_you_mean, nearest
from .coercion import leaves, prepare
from .reading import Origin

_LIMITS = {
    "exclusiveMinimum": "above {}",
    "minimum": "at least {}",
    "exclusiveMaximum": "below {}",
    "maximum": "at most {}",
    "minLength": "not shorter than {}",
}
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list",
    "object": "an object {...}",
    "null": "null",
}


def expectation(model: type[BaseModel], key: str) -> str:
    """Describe in words what a field accepts."""
    schema = _schema(model)
    return _expectation(schema["properties"].get(key, {}), schema.get("$defs", {}))


@lru_cache(maxsize=64)
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _expectation(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _expectation(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "enum" in schema:
        return "one of " + ", ".join(repr(value) for value in schema["enum"])
    if "const" in schema:
        return repr(schema["const"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_expectation(part, definitions) for part in schema[union]))
    words = _TYPES.get(schema.get("type", ""), "a value")
    if schema.get("type") == "array" and schema.get("items"):
        words += f" of which each is {_expectation(schema['items'], definitions)}"
    limits = [text.format(schema[limit]) for limit, text in _LIMITS.items() if limit in schema]
    return " ".join([words, " and ".join(limits)]).strip()


def about(model: type[BaseModel], key: str) -> str:
    """Return a field's description and default, for a remedy."""
    info = model.model_fields[key]
    description = (info.description or "").strip()
    if info.default is PydanticUndefined or info.default in (None, ()):
        return f"{key}: {description}"
    return f"{key}: {description} Default: {info.default!r}."


class PartCheck:
    """The check of one part against its model, which collects everything that is wrong with it."""

    def __init__(self, findings: list[Finding], *, elsewhere: Mapping[str, str] | None = None) -> None:
        self.findings = findings
        self.elsewhere = elsewhere or {}

    def validate(
        self,
        model: type[BaseModel],
        raw: Mapping[str, Any],
        prefix: str,
        origin: Callable[[str], Origin],
        *,
        known: Iterable[str] = (),
    ) -> BaseModel | None:
        """Return the validated part, or None after adding findings.

        Args:
            model: The part's pydantic model.
            raw: Its values as read.
            prefix: Dotted path in front of its keys, with the dot.
            origin: Returns the origin of a key's value.
            known: Further keys that are accepted beside the model's, for hints.
        """
        ready, refused = prepare(model, raw, lambda key: origin(key).base)
        for item in refused:
            problem = f"{item.problem}; must be {expectation(item.model, item.key)}" if item.of_type else item.problem
            top = origin((item.path or item.key).partition(".")[0])
            self._add(item.model, prefix + item.path, item.key, item.value, problem, lambda _, top=top: top)
        try:
            validated = model.model_validate(ready)
        except ValidationError as error:
            skip = {item.path + item.key for item in refused}
            self._collect(error, model, raw, prefix, origin, known=known, skip=skip)
            return None
        return None if refused else validated

    def _collect(
        self,
        error: ValidationError,
        model: type[BaseModel],
        raw: Mapping[str, Any],
        prefix: str,
        origin: Callable[[str], Origin],
        *,
        known: Iterable[str],
        skip: set[str],
    ) -> None:
        seen: set[str] = {prefix + key for key in skip}
        errors = error.errors(include_url=False)
        for item in errors:
            where = _innermost(model, raw, prefix, item["loc"])
            key = str(where.rest[0]) if where.rest else ""
            # a default that is made of another value is as wrong as that one, which is said
            derived = item["type"] != "missing" and key in where.model.model_fields and key not in where.raw
            if where.prefix + key in seen or (derived and (skip or len(errors) > 1)):
                continue
            seen.add(where.prefix + key)
            top = str(item["loc"][0]) if item["loc"] else ""
            source = origin if where.model is model else lambda _, top=top: origin(top)
            self._say(item, where, key, source, known if where.model is model else ())

    def _say(
        self, item: Any, where: _ErrorLocation, key: str, origin: Callable[[str], Origin], known: Iterable[str]
    ) -> None:
        model, raw, prefix = where.model, where.raw, where.prefix
        if item["type"] == "extra_forbidden" and len(where.rest) == 1:
            self.unknown(key, raw[key], prefix, origin(key), [*model.model_fields, *known])
        elif item["type"] == "missing" and len(where.rest) == 1:
            problem = f"is required: {expectation(model, key)}"
            self.findings.append(Finding(origin(key).file, prefix + key, None, problem, about(model, key)))
        elif key in model.model_fields:
            self._add(model, prefix, key, raw.get(key), _problem(item, where.rest, model, key), origin)
        else:
            self._whole(model, item, raw, prefix, origin)

    def _whole(
        self,
        model: type[BaseModel],
        item: Any,
        raw: Mapping[str, Any],
        prefix: str,
        origin: Callable[[str], Origin],
    ) -> None:
        """Add an error of the part as a whole, under the first of its keys that the message names, given or not."""
        message = str(item["msg"]).removeprefix("Value error, ")
        named = next((key for key in raw if key in message), None)
        missing = next((key for key in model.model_fields if key in message), None) if named is None else None
        key = prefix + (named or missing or "") if named or missing else prefix.rstrip(".")
        value = raw[named] if named else None if missing else dict(raw)
        remedy = about(model, missing) if missing else "change one of the values it names"
        source = origin(named or missing or "")
        self.findings.append(Finding(source.file, key, shown(key, value), message, remedy))

    def _add(
        self,
        model: type[BaseModel],
        prefix: str,
        key: str,
        value: object,
        problem: str,
        origin: Callable[[str], Origin],
    ) -> None:
        remedy = did_you_mean(str(value), _literals(model, key)) + about(model, key)
        self.findings.append(Finding(origin(key).file, prefix + key, shown(key, value), problem, remedy))

    def unknown(self, key: str, value: object, prefix: str, origin: Origin, known: Iterable[str]) -> None:
        """Add the finding of an unknown key."""
        if len(self.findings) >= SHOWN_FINDINGS:  # nobody reads its remedy, and looking for near keys takes long
            self.findings.append(Finding(origin.file, prefix + key, None, "is not a known key", "leave it out"))
            return
        names = list(dict.fromkeys(known))
        close = nearest(key, names)
        if key in self.elsewhere:
            remedy = f"{key!r} belongs in {self.elsewhere[key]}"
        elif close:
            remedy = f"did you mean {close!r}?"
        elif nearest(key, self.elsewhere):
            other = nearest(key, self.elsewhere)
            remedy = f"did you mean {other!r}, which belongs in {self.elsewhere[str(other)]}?"
        else:
            remedy = _list_or_schema(names)
        self.findings.append(Finding(origin.file, prefix + key, shown(key, value), "is not a known key", remedy))


def _list_or_schema(names: list[str]) -> str:
    if not names:
        return "leave it out: nothing can be set here"
    if len(names) <= 15:
        return f"known keys: {', '.join(names)}"
    return "leave it out; `distill config schema` prints all known keys"


def _literals(model: type[BaseModel], key: str) -> list[str]:
    info = model.model_fields[key]
    return [leaf.part for leaf in leaves(info.annotation, tuple(info.metadata)) if isinstance(leaf.part, str)]


@dataclass(frozen=True)
class _ErrorLocation:
    """The location of an error: the innermost model around it, its values, the prefix of its keys, and the rest of the
    path.
    """

    model: type[BaseModel]
    raw: Mapping[str, Any]
    prefix: str
    rest: Sequence[int | str]


def _innermost(
    model: type[BaseModel], raw: Mapping[str, Any], prefix: str, location: Sequence[int | str]
) -> _ErrorLocation:
    """Follow an error into the models that a part's fields, or the elements of its lists and objects, are."""
    here = _ErrorLocation(model, raw, prefix, location)
    key = str(location[0]) if location else ""
    if len(location) < 2 or key not in model.model_fields:
        return here
    inside = [leaf.part for leaf in leaves(model.model_fields[key].annotation)]
    models = [part for part in inside if isinstance(part, type) and issubclass(part, BaseModel)]
    value, path, index = raw.get(key), key, location[1]
    named = get_origin(model.model_fields[key].annotation) is dict
    if isinstance(index, int) or named:
        inner = isinstance(value, list | tuple) if isinstance(index, int) else isinstance(value, Mapping)
        value = value[index] if inner else None  # type: ignore[index]
        path = f"{key}.{index}"
    if len(models) != 1 or not isinstance(value, Mapping):
        return here
    return _innermost(models[0], value, f"{prefix}{path}.", location[2 if isinstance(index, int) or named else 1 :])


def _problem(item: Any, location: Sequence[int | str], model: type[BaseModel], key: str) -> str:
    inner = "".join(f"[{part}]" if isinstance(part, int) else "" for part in location[1:])
    if item["type"] == "extra_forbidden":
        return f"{inner} has the unknown key {location[-1]!r}; must be {expectation(model, key)}".strip()
    if item["type"] == "value_error":
        return str(item["msg"]).removeprefix("Value error, ")
    if inner and item["type"] == "missing":
        return f"{inner} lacks {location[-1]!r}"
    return f"{inner} must be {expectation(model, key)}".strip()
