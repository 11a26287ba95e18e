"""The command line. Commands live in modules of their own, which are imported when they are called."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from ..errors import DistillError, PluginError, described
from ..utils.console import console
from ..utils.redaction import redacted

COMMANDS = {
    "run": "Run a distillation from start to end.",
    "evaluate": "Score a student against its teacher.",
    "report": "Write the report of a run, also while it runs, or of two side by side, as one HTML page.",
    "generate": "Make images with a student.",
    "publish": "Publish a finished student.",
    "config": "Check, show or start a configuration.",
    "plugins": "List, show, write and check plugins.",
    "recipes": "List and show published settings.",
    "lora": "Extract, resize and merge LoRAs.",
    "data": "Report what the datasets contain.",
    "cache": "Build, verify or clear the text and latent caches.",
    "doctor": "Report what this machine has and lacks for a configuration.",
}
"""Command -> its line in the help; each is `NAME` or `app` of the module of its name."""
INTERRUPTED = 130
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables by which users say how OpenMP's threads wait: the standard's, GNU's, Intel's."""
SPINS = "30000"
"""Rounds that a waiting thread spins before it sleeps; the default is 300,000."""


class LazyGroup(TyperGroup):
    """Imports a command's module when the command is called, and turns errors into messages and exit codes."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return all commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command's line for the help; the command itself is loaded when it is resolved."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Load the command of the first argument."""
        self.commands = {name: self.get_command(ctx, name) for name in COMMANDS}  # for "did you mean"
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a user's mistake is printed without a traceback, a fault keeps its own."""
        try:
            with console(propagate=False):
                return named_failures(super().invoke, ctx)
        except DistillError as error:
            if isinstance(error, PluginError) and error.__cause__:
                attribution = import_module("..registry.attribution", __name__)
                typer.echo(attribution.plugin_traceback(error.__cause__), err=True)
            say_error(_message(error))
            raise typer.Exit(error.exit_code or DistillError.exit_code) from error
        except KeyboardInterrupt as error:
            attribution = _attribution()
            place = attribution.place_in_plugin(error) if attribution else None
            say_error("interrupted" + (f": {place.replace(' failed in ', ' was in ')}" if place else ""))
            raise typer.Exit(INTERRUPTED) from None


def load_command(name: str) -> Any:
    """Return the command `name` as typer's own object: its module's function of that name, or its `app`."""
    module = import_module(f".{name}", __name__)
    own = getattr(module, "app", None)
    if own is not None:
        command: Any = get_group(own)
    else:
        own = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        own.command(name=name)(getattr(module, name))
        command = get_command(own)
    command.name = name
    return command


def named_failures(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `call` returns; an error of a plugin's own code carries the plugin's name.

    No command ends by SystemExit: one that comes from inside is a failure, whatever its exit code says.
    """
    try:
        return call(*arguments)
    except (DistillError, KeyboardInterrupt):
        raise
    except BaseException as error:
        refused = import_module("..utils.disk", __name__).explained(
            error, place=Path.cwd(), remedy="give the command again"
        )
        if refused is not None:
            raise refused from error
        attribution = _attribution()
        failure = attribution.attribute_error(error) if attribution else None
        if failure is None and isinstance(error, SystemExit):
            failure = DistillError(f"the command was ended from inside: {described(error)}")
        if failure is None:
            raise
        raise failure from error


def _attribution() -> Any:
    """Return the module that knows plugins by their code, where any plugin can have run."""
    return sys.modules.get(f"{__name__.rsplit('.', 1)[0]}.registry.attribution")


def _message(error: DistillError) -> str:
    """Return an error's text; a plugin's own kind of DistillError may have none."""
    return described(error).removeprefix(f"{type(error).__name__}: ")


def say_error(message: str) -> None:
    """Print to stderr, the first word in red on a terminal."""
    head = typer.style("error:", fg=typer.colors.RED, bold=True) if sys.stderr.isatty() else "error:"
    typer.echo(f"{head} {redacted(message)}", err=True)


app = typer.Typer(
    name="distill",
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(import_module(__name__.rsplit(".", 2)[0]).__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn slow, many-step diffusion models into few-step ones."""


def wait_without_spinning() -> None:
    """Let OpenMP's waiting threads sleep after a short while, unless the environment says how they wait.

    By default they spin thirty times as long, and beside other work on the machine each parallel loop then waits for a
    thread whose core a spinning one keeps; threads that never spin cost a run alone half of its speed. It is read when
    PyTorch loads, and inherited by the processes that a command starts.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a fault of ours, which may quote what nobody is to see."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `distill` and `python -m distill`; always ends in SystemExit."""
    wait_without_spinning()
    sys.excepthook = _fault
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="distill")
    finally:
        if arguments is None:
            gc.freeze()  # the process ends: it need not search all that its libraries hold for cycles first
