"""`distill plugins check`: the conformance suite on somebody's plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..testing import Outcome
    from ..testing.report import Result

COLOURS = {"ok": typer.colors.GREEN, "failed": typer.colors.RED, "not applicable": typer.colors.YELLOW}


def check(
    plugin: Annotated[
        str, typer.Argument(metavar="PATH_OR_PACKAGE", help="A plugin file, project, module or package.")
    ],
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Run only the checks whose name contains this text, for example flow.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the checks that failed.")] = False,
) -> None:
    """Run the conformance suite on a plugin; the exit code is 1 if a check fails."""
    from ..errors import UserError
    from ..testing import check_plugin

    def tell(outcome: Outcome) -> None:
        if not quiet and outcome.result != "failed":
            typer.echo(_coloured(str(outcome), outcome.result))

    report = check_plugin(plugin, only=only, tell=tell)
    if not report.outcomes:
        raise UserError(f"no check has {only!r} in its name.", "leave out --only to see all names.")
    for text in report.failures():  # at the end: one reason may be that of many checks
        typer.echo(_coloured(text, "failed"))
    typer.echo(str(report))
    if report.failed:
        raise typer.Exit(1)


def _coloured(text: str, result: Result) -> str:
    """Return a text that begins with a result, the result in its colour."""
    return f"{typer.style(result, fg=COLOURS[result])}{text.removeprefix(result)}"
