"""`distill plugins`: list, show, new."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import ValidationError

from ..config.optimizers import own_settings
from ..config.requirements import SWITCHES
from ..errors import UserError
from ..plugin_api.method import ModelType
from .check import check
from .options import PluginOption

if TYPE_CHECKING:
    from ..plugin_api.method import Method, Requirements, Role
    from ..registry.registry import Registry

app = typer.Typer(no_args_is_help=True, help="List, show, write and check plugins.", pretty_exceptions_enable=False)
app.command()(check)


@app.command(name="list")
def list_plugins(
    kind: Annotated[
        str | None, typer.Option(help="Only this kind: method, family, data-backend, tracker, ..., hooks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects, for programs.")] = False,
    plugin: PluginOption = None,
) -> None:
    """List every registered plugin: its kind, name, version and origin, and whether it can be used on this machine.

    Installed packages that cannot be loaded are said at the end, with the reason, and the exit code is 2 then.
    """
    from ..registry.registry import Registry
    from .plugin_table import as_table, rows

    refused: list[UserError] = []
    registry = Registry.load(plugin or (), refused=refused)
    found = rows(registry, kind)
    if as_json:
        typer.echo(json.dumps([row.as_json() for row in found], indent=2, ensure_ascii=False))
    else:
        as_table(found)
    if refused:
        raise UserError(
            "\n".join(f"{error.message}\n  {error.remedy}" for error in refused), "All others are listed above."
        )


@app.command()
def new(
    kind: Annotated[
        str, typer.Argument(help="method, family, data-backend, tracker, optimizer, quantizer, evaluator, publisher.")
    ],
    name: Annotated[str, typer.Argument(help="Name used in configurations: small letters, digits and dashes.")],
    single_file: Annotated[
        bool, typer.Option("--single-file", help="Write one file for --plugin instead of a package.")
    ] = False,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder that it is written to.")] = Path(),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID", help="For a family: read its pipeline from this model's configs, without weights."
        ),
    ] = None,
) -> None:
    """Write a working plugin as a package: the code, a test and a README."""
    from ..registry.registry import KINDS, Registry
    from .plugin_table import chosen_kind
    from .scaffold import Names, check_name, read_model, write_plugin

    names, registry = Names(chosen_kind(kind, KINDS), name), Registry.load(refused=[])
    check_name(names.kind, name, registry)
    read = None if model is None else read_model(names, model, registry)
    target = write_plugin(names, output, single_file=single_file, read=read)
    typer.echo(f"wrote {target} (class {names.class_name}). Next:")
    steps = [f"distill plugins show {name} --plugin {target}", f"distill plugins check {target}"]
    if not single_file:
        steps = [f'pip install -e "{target}[test]"', f"distill plugins show {name}", f"pytest {target}"]
    for step in steps:
        typer.echo(f"  {step}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A registered name or alias; KIND.NAME where several kinds have it.")],
    plugin: PluginOption = None,
) -> None:
    """Show what a plugin does, where it comes from, and its settings."""
    from ..registry.registry import Registry

    registry = Registry.load(plugin or ())
    for index, kind in enumerate(kinds_of(registry, name)):
        own = name.rpartition(".")[2] if not registry.known(kind, name) else name
        typer.echo(("\n" if index else "") + describe(registry, kind, own))


def kinds_of(registry: Registry, name: str) -> list[str]:
    """Return the kinds that have the name. Raises UserError where none has."""
    from ..registry.registry import KINDS
    from ..utils.suggest import did_you_mean

    kinds = [kind for kind in KINDS if registry.known(kind, name)]
    kind, dot, own = name.partition(".")
    if not kinds and dot and kind in KINDS:
        registry.get(kind, own)
        kinds = [kind]
    if not kinds:
        every = [known for kind in KINDS for known in registry.names(kind)]
        remedy = f"{did_you_mean(name, every)}`distill plugins list` shows all names."
        raise UserError(f"nothing is registered as {name!r}.", remedy)
    return kinds


def describe(registry: Registry, kind: str, name: str) -> str:
    """Return everything about one plugin, as text."""
    from ..config.docs import own_first
    from ..config.findings import expectation

    found, provenance = registry.get(kind, name), registry.provenance(kind, name)
    version = "" if provenance.version in ("", *provenance.source.split()) else f" {provenance.version}"
    lines = [f"{found.name} ({kind.replace('_', ' ')}), {provenance.source}{version}, {provenance.plugin}"]
    lines += [f"aliases: {', '.join(found.aliases)}"] if found.aliases else []
    lines += ["", inspect.getdoc(found) or "", ""]
    keys = own_first(found.Config)
    lines += ["settings:"] if keys else ["no settings"]
    for key in keys:
        info = found.Config.model_fields[key]
        default = "required" if info.is_required() else f"default {info.default!r}"
        lines.append(f"  {key}: {expectation(found.Config, key)}; {default}")
        lines += [f"      {' '.join((info.description or '').split())}"] if info.description else []
    lines += ["", *packages(found)] if found.packages else []
    lines += ["", *needs(found)] if kind == "method" else []
    lines += ["", *published(found)] if kind == "method" and found.recommended else []
    return "\n".join(lines).rstrip()


def packages(found: type[Any]) -> list[str]:
    """Return the third-party packages that a plugin needs, and whether each is installed."""
    from ..utils.packages import missing

    absent = missing(found.packages)
    state = {name: f"missing; pip install '{install}'" for name, install in absent.items()}
    return ["packages:", *(f"  {name}: {state.get(name, 'installed')}" for name in found.packages)]


def published(method: type[Method]) -> list[str]:
    """Return what a method recommends, and where it was read."""
    from ..config.published import as_words, told_only

    lines = ["published settings, which stand in for keys that nobody set:"]
    for each in method.recommended:
        student = f"model_type {each.model_type}" if each.model_type else "either model_type"
        families = f", families {', '.join(each.families)}" if each.families else ""
        lines.append(f"  {student}{families} ({each.source})")
        values = [as_words(*item) for item in (*each.run.items(), *each.method.items())]
        lines.append(f"      {', '.join(values)}")
        lines += [f"      not set: {', '.join(told_only(each))}"] if told_only(each) else []
    return lines


def needs(method: type[Method]) -> list[str]:
    """Return what a method needs of data, family and settings, and its networks, for either kind of training."""
    from ..engine.returned import roles_of
    from ..plugin_api.method import MethodSetup

    try:
        config = method.Config()
    except ValidationError as error:
        required = ", ".join(dict.fromkeys(str(item["loc"][0]) for item in error.errors() if item["loc"]))
        return [f"needs: {inspect.getdoc(method.requires)} It depends on {required}."]
    lines = ["needs, with these defaults:"]
    for model_type in get_args(ModelType):
        setup = MethodSetup(model_type)
        try:
            needed, roles = method.requires(config, setup), roles_of(method, config, setup)
        except UserError as error:
            lines.append(f"  model_type {model_type}: not possible: {error.message}")
            continue
        lines.append(f"  model_type {model_type}: {'; '.join(_needs(needed, model_type))}")
        lines.append(f"      networks: {', '.join(_network(role) for role in roles)}")
    return lines


def _needs(needed: Requirements, model_type: str) -> list[str]:
    words = ["images with captions" if needed.images else "captions alone, no images"]
    if needed.trajectory_points:
        points = "" if needed.trajectory_points == 1 else f" and {needed.trajectory_points} points of the path"
        words += [f"trajectories of noise and the teacher's latents{points} (a distillation cache)"]
    words += [meaning for switch, meaning in SWITCHES.items() if getattr(needed, switch)]
    words += ["lora_dropout 0"] if needed.zero_dropout and model_type == "lora" else []
    words += [f"a grid of {needed.divides_timesteps} times"] if needed.divides_timesteps else []
    words += ["an x0 at the last timestep: no epsilon model with zero terminal SNR"] if needed.finite_snr else []
    return words


def _network(role: Role) -> str:
    if role.ema_of:
        return f"{role.name} (average of {role.ema_of})"
    if role.copy_of:
        return f"{role.name} (copy of {role.copy_of}, frozen)"
    inputs = [word for on, word in ((role.guidance_embedding, "guidance"), (role.second_time, "second time")) if on]
    named = {"none": "frozen, of its own" if role.auxiliary else "frozen", "module": "a module of its own"}
    trained = named.get(role.trains, role.trains)
    if role.trains == "head":
        trained = f"heads on features, {role.heads}, of {'all levels' if role.head_levels == 'all' else 'the middle'}"
    return f"{role.name} ({', '.join([trained, *(f'takes {word}' for word in inputs), *own_settings(role)])})"
