"""`distill plugins`: list, show."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..plugins import Registry

app = typer.Typer(no_args_is_help=True, help="What is there, and from where.", pretty_exceptions_enable=False)
PluginOption = Annotated[list[Path] | None, typer.Option("--plugin", help="Plugin file to load.")]


@app.command(name="list")
def list_plugins(plugin: PluginOption = None) -> None:
    """Every registered name by kind, with what it is and where it comes from."""
    from ..plugins import KINDS, Registry

    registry = Registry.load(plugin or ())
    rows = [
        (kind.replace("_", " "), name, registry.provenance(kind, name).source, first_line(registry.get(kind, name)))
        for kind in KINDS
        for name in registry.names(kind)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A registered name or alias; KIND.NAME where several kinds have it.")],
    plugin: PluginOption = None,
) -> None:
    """What a plugin is, where it comes from, and its settings."""
    from ..plugins import Registry

    registry = Registry.load(plugin or ())
    for index, kind in enumerate(kinds_of(registry, name)):
        own = name.rpartition(".")[2] if not registry.known(kind, name) else name
        typer.echo(("\n" if index else "") + describe(registry, kind, own))


def kinds_of(registry: Registry, name: str) -> list[str]:
    """Kinds that have the name. Raises UserError where none has."""
    from ..names import nearest
    from ..plugins import KINDS

    kinds = [kind for kind in KINDS if registry.known(kind, name)]
    kind, dot, own = name.partition(".")
    if not kinds and dot and kind in KINDS:
        registry.get(kind, own)
        kinds = [kind]
    if not kinds:
        every = [known for kind in KINDS for known in registry.names(kind)]
        close = nearest(name, every)
        hint = f"did you mean {close!r}? " if close else ""
        raise UserError(f"nothing is registered as {name!r}.", f"{hint}`distill plugins list` shows all names.")
    return kinds


def first_line(found: type[Any]) -> str:
    """The first line of a class's own docstring."""
    return (inspect.getdoc(found) or "").split("\n", 1)[0]


def describe(registry: Registry, kind: str, name: str) -> str:
    """Everything about one plugin, as text."""
    from ..config.findings import expectation

    found, provenance = registry.get(kind, name), registry.provenance(kind, name)
    lines = [f"{found.name} ({kind.replace('_', ' ')}), {provenance.source}, {provenance.plugin}"]
    aliases = getattr(found, "aliases", ())
    lines += [f"aliases: {', '.join(aliases)}"] if aliases else []
    lines += ["", inspect.getdoc(found) or "", ""]
    fields = found.Config.model_fields
    lines += ["settings:"] if fields else ["no settings"]
    for key, info in fields.items():
        default = "required" if info.is_required() else f"default {info.default!r}"
        lines.append(f"  {key}: {expectation(found.Config, key)}; {default}")
        lines += [f"      {' '.join((info.description or '').split())}"] if info.description else []
    return "\n".join(lines).rstrip()
