"""`distill cache`: the text and latent caches without training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..config import Configuration
    from ..plugins import Registry

app = typer.Typer(help="Build, verify or clear the text and latent caches.", no_args_is_help=True)

Config = Annotated[Path | None, typer.Option("--config", help="The run's configuration file.")]
Data = Annotated[Path | None, typer.Option("--data", help="The data file (multidatabackend.json).")]
Model = Annotated[str | None, typer.Option("--model", help="Hub id, diffusers folder or .safetensors file.")]
Family = Annotated[str | None, typer.Option("--family", help="Model family.")]
OutputDir = Annotated[Path | None, typer.Option("--output-dir", help="The run's output folder.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable.")]
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A plugin file; repeatable.")]
OnlyDataset = Annotated[str | None, typer.Option("--dataset", help="Only the caches of this dataset id.")]


@app.command()
def build(
    config: Config = None,
    data: Data = None,
    model: Model = None,
    family: Family = None,
    output_dir: OutputDir = None,
    overrides: Overrides = None,
    plugin: Plugins = None,
) -> None:
    """Encode what the caches lack, as the first run would."""
    configuration, registry = _configuration(config, data, model, family, output_dir, overrides, plugin)
    from ..assemble import build_family
    from ..data.pipeline import DataPipeline

    teacher = build_family(configuration, registry)
    teacher.check_source()
    run = configuration.run
    DataPipeline(
        configuration, registry, teacher, micro_batch_size=run.train_batch_size,
        accumulation=run.gradient_accumulation_steps, seed=run.seed, cache_root=run.output_dir / "cache", say=_say,
    ).prepare()  # fmt: skip


@app.command()
def verify(
    config: Config = None,
    data: Data = None,
    model: Model = None,
    family: Family = None,
    output_dir: OutputDir = None,
    overrides: Overrides = None,
    plugin: Plugins = None,
) -> None:
    """Check every file of the caches against its checksum; damaged ones are removed, and made anew by the next run."""
    configuration, _ = _configuration(config, data, model, family, output_dir, overrides, plugin)
    from ..data.cache import TensorCache
    from ..errors import DistillError

    damaged = checked = 0
    for folder, descriptor in _folders(configuration, None):
        cache = TensorCache(folder.parent, descriptor, label=f"{descriptor['kind']} cache {folder}", say=_say)
        damaged += len(cache.load(thorough=True))
        checked += 1
        _say(f"{folder}: {len(cache):,} entries, {cache.num_bytes / 2**20:,.1f} MiB")
    if not checked:
        _say("there is no cache yet")
    if damaged:
        raise DistillError(
            f"{damaged} damaged files were removed; `distill cache build` or the next run makes them anew"
        )


@app.command()
def clear(
    config: Config = None,
    data: Data = None,
    model: Model = None,
    family: Family = None,
    output_dir: OutputDir = None,
    overrides: Overrides = None,
    plugin: Plugins = None,
    dataset: OnlyDataset = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the caches of this configuration's datasets, those of other models and earlier settings included."""
    configuration, _ = _configuration(config, data, model, family, output_dir, overrides, plugin)
    from ..data.cache import remove_cache

    folders = _folders(configuration, dataset)
    for folder, _ in folders:
        _say(str(folder))
    if not folders:
        _say("there is no cache to clear")
    elif not yes:
        typer.confirm(f"Remove these {len(folders)} caches?", abort=True, err=True)
    freed = sum(remove_cache(folder) for folder, _ in folders)
    for file in _side_files(configuration, dataset):
        file.unlink(missing_ok=True)
    _say(f"freed {freed / 2**20:,.1f} MiB")


def _configuration(
    config: Path | None,
    data: Path | None,
    model: str | None,
    family: str | None,
    output_dir: Path | None,
    overrides: list[str] | None,
    plugins: list[Path] | None,
) -> tuple[Configuration, Registry]:
    from ..config import load_configuration
    from ..plugins import Registry

    registry = Registry.load(plugins or [])
    flags = {"pretrained_model_name_or_path": model, "model_family": family, "output_dir": output_dir}
    given = {key: str(value) for key, value in flags.items() if value is not None}
    return load_configuration(
        registry, config_file=config, data_file=data, flags=given, overrides=overrides or []
    ), registry


def _folders(configuration: Configuration, dataset: str | None) -> list[tuple[Path, dict[str, object]]]:
    """Folders and descriptors of all caches of the configuration's datasets, or of one dataset's latents."""
    from ..data.cache import cache_folders
    from ..data.pipeline import CachePlaces, dataset_folders

    places = CachePlaces(configuration, configuration.run.output_dir / "cache")
    found = {
        folder: descriptor
        for parent in dataset_folders(places, configuration.datasets)
        for folder, descriptor in cache_folders(parent)
        if dataset is None or descriptor.get("dataset") == dataset
    }
    return sorted(found.items())


def _side_files(configuration: Configuration, dataset: str | None) -> list[Path]:
    """Indexes, remembered settings and quarantine lists beside the latents."""
    from ..data.pipeline import CachePlaces

    places = CachePlaces(configuration, configuration.run.output_dir / "cache")
    return [file for each in configuration.datasets if dataset in (None, each.id) for file in places.side_files(each)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
