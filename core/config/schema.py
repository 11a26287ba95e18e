"""The JSON Schema of the configuration, for editors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..settings.configuration import PARTS
from ..settings.dataset_settings import DatasetSettings
from ..settings.run_settings import RunSettings
from .normalise import RUN_ALIASES, SWITCH_ALIASES

if TYPE_CHECKING:
    from ..registry.registry import Registry


def json_schema(registry: Registry) -> dict[str, Any]:
    """Return the schema of a run's file, with the parts of every registered plugin and the datasets under ``data``."""
    definitions: dict[str, Any] = {}
    run = _part(RunSettings, "run", definitions)
    properties: dict[str, Any] = run["properties"]
    properties["aspect_bucket_rounding"]["maximum"] = 1024  # above 9 it is an alignment
    for alias, name in RUN_ALIASES.items():
        properties[alias] = {**properties[name], "description": f"Alias of {name}."}
    for alias, names in SWITCH_ALIASES.items():
        properties[alias] = {"type": "boolean", "description": f"Sets {', '.join(names)}."}
    for key, kind in PARTS.items():
        parts = {
            name: _part(registry.get(kind, name).Config, f"{kind}.{name}", definitions) for name in registry.names(kind)
        }
        properties[key] = {"type": "object", "description": f"Settings by name of {kind}.", "properties": parts}
    properties["data"] = {
        "type": "array",
        "description": "Datasets, as in the data file.",
        "items": _dataset(registry, definitions),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "distill configuration",
        "description": "Numbers and truth values may also be written as texts; keys may begin with --.",
        "type": "object",
        "properties": properties,
        "patternProperties": {"^--": {}},
        "additionalProperties": False,
        "$defs": definitions,
    }


def _dataset(registry: Registry, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _part(DatasetSettings, "dataset", definitions)
    schema["properties"].pop("backend", None)
    for name in registry.names("data_backend"):
        own = _part(registry.get("data_backend", name).Config, f"data_backend.{name}", definitions)
        for key, value in own["properties"].items():
            schema["properties"].setdefault(key, value)
    schema["required"] = ["id"]
    return schema


def _part(model: type[BaseModel], owner: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a model's schema, with its own definitions moved to the top under the owner's name."""
    schema = model.model_json_schema(ref_template=f"#/$defs/{owner}.{{model}}")
    definitions.update({f"{owner}.{name}": inner for name, inner in schema.pop("$defs", {}).items()})
    schema["additionalProperties"] = False
    return schema
