"""`distill run`: a distillation run, start to end."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .options import (
    ConfigOption,
    DataOption,
    FamilyOption,
    MethodOption,
    ModelOption,
    OutputOption,
    PluginOption,
    SetOption,
)


def run(
    method: MethodOption = None,
    family: FamilyOption = None,
    config: ConfigOption = None,
    data: DataOption = None,
    model: ModelOption = None,
    output_dir: OutputOption = None,
    set_: SetOption = None,
    plugin: PluginOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what the output folder holds of an earlier run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan, without loading weights.")
    ] = False,
) -> None:
    """Distil a teacher into a few-step student: caches, training, validation, export, scores.

    Without --model it uses the miniature that ships with the family, and its pictures.
    """
    configuration, registry = options.load(
        config=config,
        data=data,
        method=method,
        family=family,
        model=model,
        output_dir=output_dir,
        overwrite=overwrite,
        overrides=set_,
        plugins=plugin,
    )
    if dry_run:
        from .plan import print_plan

        print_plan(configuration, registry)
        return
    from ..run import run as distil

    distil(configuration, registry, say=options.say)
