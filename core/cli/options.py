"""Options that several commands share, and what they load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration

MethodOption = Annotated[str | None, typer.Option("--method", help="Distillation method (`distill plugins list`).")]
FamilyOption = Annotated[str | None, typer.Option("--family", help="Model family (`distill plugins list`).")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Configuration: JSON, YAML or TOML.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="List of datasets: JSON, YAML or TOML.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id, diffusers folder or .safetensors file of the teacher.")
]
OutputOption = Annotated[Path | None, typer.Option("--output-dir", help="Folder of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as learning_rate=2e-4 or data.<id>.crop=true."),
]
PluginOption = Annotated[list[Path] | None, typer.Option("--plugin", help="Plugin file to load.")]


def load(
    *,
    config: Path | None = None,
    data: Path | None = None,
    method: str | None = None,
    family: str | None = None,
    model: str | None = None,
    output_dir: Path | None = None,
    overwrite: bool = False,
    overrides: list[str] | None = None,
    plugins: list[Path] | None = None,
) -> tuple[Configuration, Registry]:
    """The configuration of the options given, and the registry with its plugins."""
    from ..config.load import load_configuration
    from ..registry.registry import Registry

    registry = Registry.load(plugins or ())
    flags = {
        "distillation_method": method,
        "model_family": family,
        "pretrained_model_name_or_path": model,
        "output_dir": str(output_dir) if output_dir else None,
        "overwrite": overwrite or None,
    }
    configuration = load_configuration(
        registry, config_file=config, data_file=data, flags=flags, overrides=overrides or ()
    )
    return configuration, registry


def service_notices(configuration: Configuration, registry: Registry) -> list[str]:
    """What trackers, publishers and evaluators will warn of at the start of the run."""
    from ..engine.tracking import build_trackers
    from ..evaluation.evaluators import evaluation_notices
    from ..runs.publishing import build_publishers

    _, of_trackers = build_trackers(registry, configuration.run.report_to, configuration.trackers)
    _, of_publishers = build_publishers(registry, configuration)
    return [*of_trackers, *of_publishers, *evaluation_notices(registry, configuration)]
