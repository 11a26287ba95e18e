"""`distill recipes`: published settings by name."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import PluginOption

app = typer.Typer(no_args_is_help=True, help="List and show published settings.", pretty_exceptions_enable=False)


@app.command(name="list")
def list_recipes(plugin: PluginOption = None) -> None:
    """List the recipes: name, method, kind of student, family, origin, and what each is."""
    from rich.console import Console
    from rich.table import Table

    from ..config.published import find_recipe
    from ..registry.registry import Registry

    registry = Registry.load(plugin or ())
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("name", "method", "student", "family", "from", "what it is"):
        table.add_column(title, overflow="fold", no_wrap=title != "what it is")
    for name in registry.recipes:
        recipe = find_recipe(registry, name)
        keys = ("distillation_method", "model_type", "model_family")
        table.add_row(name, *(str(recipe.settings.get(key, "-")) for key in keys), recipe.source, recipe.summary)
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A recipe's name (`distill recipes list`).")], plugin: PluginOption = None
) -> None:
    """Print a recipe: every setting with its source in a comment. It is a configuration file like any other."""
    from ..config.published import find_recipe
    from ..registry.registry import Registry

    recipe = find_recipe(Registry.load(plugin or ()), name)
    typer.echo(recipe.file.read_text(encoding="utf-8").rstrip())
