"""`distill data`: what the datasets hold, before anything is encoded."""

from __future__ import annotations

import logging

import typer

from .options import Given, takes_configuration

logger = logging.getLogger(__name__)
app = typer.Typer(help="Report what the datasets contain.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Report what the datasets contain, before anything is encoded."""


@app.command()
@takes_configuration()
def report(given: Given) -> None:
    """Index the datasets and write a report on each: counts, sizes, buckets, captions, what is left out, samples.

    No weights are loaded. Files are judged by their headers: damage further in is found by `distill cache build`.
    """
    configuration, registry = given.load()
    from ..runs.builders import build_pipeline
    from ..runs.output_folder import REPORTS_FOLDER
    from ..runs.run_files import RunFiles

    pipeline = build_pipeline(configuration, registry)
    folder = configuration.run.output_dir / REPORTS_FOLDER
    with RunFiles(configuration.run.output_dir).writing(REPORTS_FOLDER):
        pipeline.write_reports(folder)
    for line in pipeline.describe():
        logger.info(line)
    for dataset in configuration.datasets:
        typer.echo(folder / dataset.id / "report.md")
