"""Configuration: from files and flags to one validated :class:`Configuration`. Nothing heavy is imported here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runs.output_folder import OutputState, check_output_dir
    from ..settings.configuration import Configuration
    from ..settings.dataset_settings import DatasetSettings
    from ..settings.run_settings import RunSettings
    from .load import load_configuration
    from .requirements import check_requirements
    from .schema import json_schema

__all__ = [
    "Configuration",
    "DatasetSettings",
    "OutputState",
    "RunSettings",
    "check_output_dir",
    "check_requirements",
    "json_schema",
    "load_configuration",
]

_HOME = {
    "Configuration": "configuration",
    "DatasetSettings": "dataset_settings",
    "OutputState": "output",
    "RunSettings": "run_settings",
    "check_output_dir": "output",
    "check_requirements": "requirements",
    "json_schema": "schema",
    "load_configuration": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
