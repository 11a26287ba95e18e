"""`distill cache`: the text and latent caches without training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Given, takes_configuration

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration

logger = logging.getLogger(__name__)
app = typer.Typer(help="Build, verify or clear the text and latent caches.", no_args_is_help=True)

OnlyDataset = Annotated[
    str | None, typer.Option("--dataset", help="Take only the latents, or trajectories, of the entry with this id.")
]


@app.command()
@takes_configuration()
def build(given: Given) -> None:
    """Encode everything that the caches lack, as the first run would."""
    configuration, registry = given.load()
    from ..runs.builders import build_pipeline
    from ..runs.opening import check_cache_folders
    from ..runs.output_folder import REPORTS_FOLDER
    from ..runs.run_files import RunFiles
    from ..runs.run_lock import refuse_while_running

    folder = configuration.run.output_dir
    refuse_while_running(folder)
    check_cache_folders(configuration)
    pipeline = build_pipeline(configuration, registry)
    pipeline.prepare()
    with RunFiles(folder).writing(REPORTS_FOLDER):
        reports = pipeline.write_reports(folder / REPORTS_FOLDER)
    for report in reports:
        logger.info(f"report on dataset {report.id!r}: {report.folder / 'report.md'}")


@app.command()
@takes_configuration()
def verify(given: Given) -> None:
    """Compare the caches with their checksums and with what the datasets need: damaged, missing, orphaned entries.

    Damaged files are removed, and made anew by the next run; nothing else is.
    """
    configuration, registry = given.load()
    from ..errors import DistillError
    from ..runs.builders import build_pipeline

    found = list(build_pipeline(configuration, registry).cache_states())
    for state in found:
        logger.info(state.line())
    if any(state.num_orphaned for state in found):
        logger.info("orphaned entries are of use to other configurations only; `distill cache clear --orphaned`")
    if damaged := sum(len(state.damaged) for state in found):
        raise DistillError(f"{damaged} damaged files were removed; `distill cache build` or the next run restores them")


@app.command()
@takes_configuration()
def clear(
    given: Given,
    dataset: OnlyDataset = None,
    orphaned: Annotated[
        bool, typer.Option("--orphaned", help="Remove only entries that no dataset of this configuration needs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking for confirmation.")] = False,
) -> None:
    """Remove the caches of this configuration's datasets, including those of other models and earlier settings."""
    configuration, registry = given.load()
    from ..runs.run_lock import refuse_while_running

    refuse_while_running(configuration.run.output_dir)
    if orphaned:
        _clear_orphaned(configuration, registry, dataset, yes=yes)
        return
    from ..data.cache.tensor_cache import remove_cache

    folders = _folders(configuration, dataset)
    for folder, _ in folders:
        logger.info(str(folder))
    if not folders:
        logger.info("there is no cache to clear")
    elif not yes:
        typer.confirm(f"Remove these {len(folders)} caches?", abort=True, err=True)
    freed = sum(remove_cache(folder) for folder, _ in folders)
    for file in _side_files(configuration, dataset):
        file.unlink(missing_ok=True)
    logger.info(f"freed {freed / 2**20:,.1f} MiB")


def _clear_orphaned(configuration: Configuration, registry: Registry, dataset: str | None, *, yes: bool) -> None:
    from ..runs.builders import build_pipeline

    found = list(build_pipeline(configuration, registry).cache_states())
    found = [each for each in found if each.num_orphaned and dataset in (None, each.cache.descriptor.get("dataset"))]
    for state in found:
        logger.info(state.line())
    if not found:
        logger.info("there is nothing orphaned")
    elif not yes:
        typer.confirm(f"Remove {sum(each.num_orphaned for each in found):,} orphaned entries?", abort=True, err=True)
    freed = sum(state.remove_orphaned() for state in found)
    logger.info(f"freed {freed / 2**20:,.1f} MiB")


def _folders(configuration: Configuration, dataset: str | None) -> list[tuple[Path, dict[str, object]]]:
    """Return folders and descriptors of all caches of the configuration's datasets, or of one entry alone."""
    from ..data.cache.cache_paths import CachePaths, dataset_folders
    from ..data.cache.tensor_cache import cache_folders
    from ..runs.output_folder import CACHE_FOLDER

    paths = CachePaths(configuration, configuration.run.output_dir / CACHE_FOLDER)
    trajectories = {paths.trajectories(entry) for entry in configuration.distillation_caches if entry.id == dataset}
    found = {
        folder: descriptor
        for parent in dataset_folders(paths, configuration.datasets)
        for folder, descriptor in cache_folders(parent)
        if dataset in (None, descriptor.get("dataset"))
        or (parent in trajectories and descriptor["kind"] == "trajectories")
    }
    return sorted(found.items())


def _side_files(configuration: Configuration, dataset: str | None) -> list[Path]:
    """Return indexes, remembered settings and quarantine lists beside the latents."""
    from ..data.cache.cache_paths import CachePaths
    from ..runs.output_folder import CACHE_FOLDER

    paths = CachePaths(configuration, configuration.run.output_dir / CACHE_FOLDER)
    return [file for each in configuration.datasets if dataset in (None, each.id) for file in paths.side_files(each)]
