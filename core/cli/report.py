"""`distill report`: a run as one page, while it goes or long after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    output_dir: Annotated[Path, typer.Argument(help="The output folder of a run, finished or not.")],
) -> None:
    """Write report.html into the output folder of a run: curves, validations, scores, data, notices, configuration.

    The page needs no network and no other file; send it as it is.
    """
    from ..report.page import FILE, write_report
    from ..runs.run_files import RunFiles

    page = write_report(output_dir)
    RunFiles(output_dir).claim(FILE)
    typer.echo(page)
