"""`distill config`: check, show, schema, init."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError
from ..utils.files import write_text
from ..utils.redaction import redacted
from . import options
from .options import Given, PluginOption, looks_only, takes_configuration

logger = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, help="Check, show or start a configuration.", pretty_exceptions_enable=False)


@app.command()
@takes_configuration()
@looks_only
def check(given: Given) -> None:
    """Validate a configuration and the files of its model: notices go to stdout, errors to stderr; no weights load."""
    configuration, registry = given.load()
    unchecked = options.model_notices(configuration, registry)
    service, storage = (each(configuration, registry) for each in (options.service_notices, options.storage_notices))
    for notice in (*unchecked, *configuration.notices, *service, *storage):
        typer.echo(redacted(f"notice: {notice}"))
    logger.info("the configuration is usable")


@app.command()
@takes_configuration()
def show(given: Given) -> None:
    """Print the resolved configuration as JSON, every default filled in; notices go to stderr."""
    configuration, _ = given.load()
    for notice in configuration.notices:
        logger.info(notice)
    typer.echo(json.dumps(configuration.resolved(), indent=2, ensure_ascii=False))


@app.command()
def schema(plugin: PluginOption = None) -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from ..config.schema import json_schema
    from ..registry.registry import Registry

    typer.echo(json.dumps(json_schema(Registry.load(plugin or ())), indent=2, ensure_ascii=False))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder that the two files are written to.")] = Path("config"),
    method: Annotated[str, typer.Option("--method", help="Distillation method.")] = "lcm",
    family: Annotated[str, typer.Option("--family", help="Model family.")] = "sdxl",
    model_type: Annotated[
        Literal["lora", "full"], typer.Option("--model-type", help="Train a LoRA (lora) or the whole network (full).")
    ] = "lora",
    plugin: PluginOption = None,
) -> None:
    """Write a pair of commented files to start from: config.yaml and multidatabackend.yaml."""
    from ..config.starting import starting_config, starting_data
    from ..registry.registry import Registry

    registry = Registry.load(plugin or ())
    files = {
        folder / "config.yaml": starting_config(registry, method=method, family=family, model_type=model_type),
        folder / "multidatabackend.yaml": starting_data(),
    }
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists already.", "choose another folder: distill config init FOLDER.")
    for file, text in files.items():
        write_text(file, text)
        logger.info(f"wrote {file}")
    logger.info(f"edit them, then: distill config check --config {folder / 'config.yaml'}")
