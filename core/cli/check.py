"""`distill plugins check`: the conformance suite on somebody's plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..testing import Outcome

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
        if not quiet or outcome.result == "failed":
            typer.echo(
                f"{typer.style(outcome.result, fg=COLOURS[outcome.result])}{str(outcome)[len(outcome.result) :]}"
            )

    report = check_plugin(plugin, only=only, tell=tell)
    if not report.outcomes:
        raise UserError(f"no check has {only!r} in its name.", "leave out --only to see all names.")
    typer.echo(str(report))
    if report.failed:
        raise typer.Exit(1)
