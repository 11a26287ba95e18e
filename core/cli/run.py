"""`distill run`: a distillation run, start to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.collection import collection_paused
from .options import Given, takes_configuration

if TYPE_CHECKING:
    from ..runs.run import RunResult


@takes_configuration()
def run(
    given: Given,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in the output folder.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write a trace of ten steps and a table of their parts (profile_steps=10)."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan, without loading weights.")
    ] = False,
) -> None:
    """Distil a teacher into a few-step student: caches, training, validation, export, scores.

    Without --model it uses the miniature that ships with the family, and its images.
    """
    with collection_paused():  # until the run has looked at everything and begins with its data
        configuration, registry = given.load(overwrite=overwrite, profile=profile)
        if dry_run:
            from .plan import print_plan

            print_plan(configuration, registry)
            return
        from ..runs.run import run as distil

        _report(distil(configuration, registry))


def _report(result: RunResult) -> None:
    """Print the table of teacher against student, and where everything lies; other ranks than the first say nothing."""
    if result.rank != 0:
        return
    from rich.console import Console

    console = Console()
    if result.evaluation is not None:
        console.print(result.evaluation.table())
    lines = {
        "student": result.student,
        "side by side": result.grid,
        "scores": result.output_dir / "evaluation.json" if result.evaluation else None,
        "watch": f"tensorboard --logdir {result.output_dir}" if (result.output_dir / "tensorboard").is_dir() else None,
        "use": f'distill generate {result.output_dir} --prompt "{result.prompt}"',
    }
    for name, value in lines.items():
        if value is not None:
            console.print(f"{name:>13}  {value}", markup=False, highlight=False, soft_wrap=True)
