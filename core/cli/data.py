"""`distill data`: what the datasets hold, before anything is encoded."""

from __future__ import annotations

import logging

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

logger = logging.getLogger(__name__)
app = typer.Typer(help="What the datasets hold.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """What the datasets hold, before anything is encoded."""


@app.command()
def report(
    method: MethodOption = None,
    family: FamilyOption = None,
    config: ConfigOption = None,
    data: DataOption = None,
    model: ModelOption = None,
    output_dir: OutputOption = None,
    set_: SetOption = None,
    plugin: PluginOption = None,
) -> None:
    """Index the datasets and write a report on each: counts, sizes, buckets, captions, what is left out, samples.

    No weights are loaded. Files are judged by their headers: damage further in is found by `distill cache build`.
    """
    configuration, registry = options.load(
        method=method,
        family=family,
        config=config,
        data=data,
        model=model,
        output_dir=output_dir,
        overrides=set_,
        plugins=plugin,
    )
    from ..runs.builders import build_pipeline
    from ..runs.output_folder import REPORTS_FOLDER

    pipeline = build_pipeline(configuration, registry)
    folder = configuration.run.output_dir / REPORTS_FOLDER
    pipeline.write_reports(folder)
    for line in pipeline.describe():
        logger.info(line)
    for dataset in configuration.datasets:
        typer.echo(folder / dataset.id / "report.md")
