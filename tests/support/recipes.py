"""Recipes without a configuration file: the terms looked up in a registry and bound, as the loader does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.core.registry.registry import Registry

PLUGIN = Path(__file__).with_name("recipe_plugin.py")


def term(method: str, weight: Any = 1.0, *, stage_weights: dict[str, float] | None = None, **config: Any) -> dict:
    """A term as it stands in a configuration."""
    return {"method": method, "weight": weight, "stage_weights": stage_weights or {}, "config": config}


def recipe(registry: Registry, *terms: dict, **settings: Any) -> Any:
    """The validated ``Config`` of a recipe with its terms bound."""
    config = registry.get("method", "recipe").Config(terms=list(terms), **settings)
    for part in config.terms:
        found = registry.get("method", part.method)
        part.bind(found, found.Config(**part.config))
    return config
