"""`distill report`: a run as one page, while it goes or long after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    output_dir: Annotated[Path, typer.Argument(help="The output folder of a run, finished or not.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="The output folder of a run to lay beside it.")
    ] = None,
) -> None:
    """Write report.html into the output folder of a run: curves, validations, scores, data, notices, configuration.

    With two runs, one page of both side by side, report-with-OTHER.html in the folder of the first: curves, validation
    images of the same prompts, final scores, and the settings that differ. A page needs no network and no other file;
    send it as it is.
    """
    from ..report.page import FILE, write_comparison, write_report
    from ..runs.run_files import RunFiles

    if other is not None:
        typer.echo(write_comparison(output_dir, other))
        return
    page = write_report(output_dir)
    RunFiles(output_dir).claim(FILE)
    typer.echo(page)
