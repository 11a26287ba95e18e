"""Options that several commands share, and what they load."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnreachableError, UserError
from ..utils.collection import collection_paused

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration

MethodOption = Annotated[str | None, typer.Option("--method", help="Distillation method (`distill plugins list`).")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Published settings by name (`distill recipes list`); what you set wins.")
]
FamilyOption = Annotated[str | None, typer.Option("--family", help="Model family (`distill plugins list`).")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Configuration: JSON, YAML or TOML.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="List of datasets: JSON, YAML or TOML.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id, diffusers folder or .safetensors file of the teacher.")
]
OutputOption = Annotated[Path | None, typer.Option("--output-dir", help="Folder that the run writes to.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, for example learning_rate=2e-4 or data.<id>.crop=true; can be given several times.",
    ),
]
PluginOption = Annotated[
    list[Path] | None, typer.Option("--plugin", help="Plugin file to load; can be given several times.")
]


PROFILE_STEPS = 10
"""Steps that ``--profile`` profiles where the configuration names no other number."""
NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""Environment variable that makes ``torch.compile`` return functions as they are."""
BasePrecisionOption = Annotated[
    str | None, typer.Option(help="Quantizer of the base, or no_change; the run's by default.")
]


@dataclass(frozen=True)
class Given:
    """The options of a configuration, as they were given."""

    method: MethodOption = None
    family: FamilyOption = None
    recipe: RecipeOption = None
    config: ConfigOption = None
    data: DataOption = None
    model: ModelOption = None
    output_dir: OutputOption = None
    set_: SetOption = None
    plugin: PluginOption = None

    @functools.cached_property
    def registry(self) -> Registry:
        """Everything that has a name, with the plugin files given."""
        from ..registry.registry import Registry

        return Registry.load(self.plugin or ())

    def load(self, *, overwrite: bool = False, profile: bool = False) -> tuple[Configuration, Registry]:
        """Return the configuration of the options, and the registry with its plugins."""
        from ..config.load import load_configuration

        registry = self.registry
        flags = {
            "recipe": self.recipe,
            "distillation_method": self.method,
            "model_family": self.family,
            "pretrained_model_name_or_path": self.model,
            "output_dir": str(self.output_dir) if self.output_dir else None,
            "overwrite": overwrite or None,
        }
        configuration = load_configuration(
            registry, config_file=self.config, data_file=self.data, flags=flags, overrides=self.set_ or ()
        )
        if profile and not configuration.run.profile_steps:
            run = configuration.run.model_copy(update={"profile_steps": PROFILE_STEPS})
            configuration = replace(configuration, run=run)
        return configuration, registry


def takes_configuration(*leave_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a configuration, but those of `leave_out`; it gets them as its first argument."""
    shared = [field.name for field in fields(Given) if field.name not in leave_out]
    parameters = inspect.signature(Given, eval_str=True).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            command(Given(**{name: values.pop(name) for name in shared}), **values)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        wrapper.__signature__ = inspect.Signature([*(parameters[name] for name in shared), *own])  # type: ignore[attr-defined]
        return wrapper

    return decorate


def looks_only(command: Callable[..., None]) -> Callable[..., None]:
    """Spare a short command, which computes nothing, what slows its imports down.

    That is the collector of reference cycles, and the compiler of PyTorch, which bitsandbytes loads for functions that
    are never called here.
    """

    @functools.wraps(command)
    def wrapper(*arguments: Any, **values: Any) -> None:
        before = os.environ.get(NO_COMPILER)
        os.environ[NO_COMPILER] = "1"
        try:
            with collection_paused():
                command(*arguments, **values)
        finally:
            os.environ.pop(NO_COMPILER)
            if before is not None:
                os.environ[NO_COMPILER] = before

    return wrapper


def overrides(**keys: str | None) -> list[str]:
    """Return each key that was given as ``key=value``, to be laid over the configuration of a finished run."""
    return [f"{key}={value}" for key, value in keys.items() if value is not None]


def service_notices(configuration: Configuration, registry: Registry) -> list[str]:
    """Return what trackers, publishers and evaluators will warn of at the start of the run."""
    from ..engine.tracking import build_trackers
    from ..evaluation.evaluators import evaluation_notices
    from ..runs.publishing import build_publishers

    _, of_trackers = build_trackers(registry, configuration.run.report_to, configuration.trackers)
    _, of_publishers = build_publishers(registry, configuration)
    return [*of_trackers, *of_publishers, *evaluation_notices(registry, configuration)]


def model_notices(configuration: Configuration, registry: Registry) -> list[str]:
    """Check the model's files, and say where they could not be checked because they lie on the hub.

    Raises:
        UserError: They are no model of the family, or not those that their configs describe.
    """
    from ..runs.builders import build_family, check_method_sources, completed_configuration

    check_method_sources(configuration, registry)
    family = build_family(configuration, registry)
    try:
        family.check_source()
    except UnreachableError as error:
        return [f"the model's files are not checked: {error.message}"]
    completed = completed_configuration(configuration, registry, family)
    return list(completed.notices[len(configuration.notices) :])


def storage_notices(configuration: Configuration, registry: Registry) -> list[str]:
    """Return what would not fit on the disk, for a model whose config is on this machine."""
    from ..runs.disk_plan import disk_problem, disk_remedy, planned_disk

    source, folder = configuration.run.pretrained_model_name_or_path, configuration.run.output_dir
    try:
        plan = planned_disk(configuration, registry) if source is None or Path(source).exists() else None
    except UserError:
        return []  # what is wrong with the model is told by its own check
    problem = disk_problem(plan, folder) if plan is not None else None
    return [] if plan is None or problem is None else [f"{problem}: the run is refused. {disk_remedy(plan, folder)}"]
