"""`distill doctor`: what this machine has and lacks, for a configuration where one is given."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.strategies import StrategyName
from . import options
from .options import Given, looks_only, takes_configuration
from .processes import divisions, processes_rows, require_number

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..utils.memory import MemorySettings

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pydantic")
Rows = Iterator[tuple[str, str]]


@takes_configuration()
@looks_only
def doctor(
    given: Given,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Estimate the memory of each of so many processes.")
    ] = None,
    parallel: Annotated[
        StrategyName | None, typer.Option(help="How they share the networks; all ways in a table unless given.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=0, help="Processes that share one copy of the weights; 0: all.")] = 0,
    offload: Annotated[bool, typer.Option("--offload", help="Keep what they share in the machine's memory.")] = False,
) -> None:
    """Report what this machine has and lacks for a configuration: device, memory, optional packages, credentials."""
    require_number(processes, asked=bool(parallel or shard_size or offload))
    _section("machine", machine(given.output_dir or Path.cwd()))
    _section("packages", packages(given.registry))
    _section("credentials", credentials())
    named = (given.method, given.family, given.recipe, given.config, given.data, given.model, given.set_)
    if not any(named):
        typer.echo("\nno configuration given: --config FILE adds its checks and an estimate of its memory")
        return
    configuration, registry = given.load()
    unchecked = options.model_notices(configuration, registry)
    notices = (*unchecked, *configuration.notices, *options.service_notices(configuration, registry))
    _section("configuration", (("notice", line) for line in notices or ("nothing to be said",)))
    _section("accounts", accounts(configuration, registry))
    settings = _planned(configuration, registry)
    if settings is None or processes is None:
        _section("memory", memory(settings, configuration, registry))
    else:
        chosen = divisions(configuration.run, parallel, processes=processes, shard_size=shard_size, offload=offload)
        _section(f"memory of {processes} processes", processes_rows(settings, chosen, configuration, registry))
    _section("disk", disk(configuration, registry))


def _section(title: str, rows: Rows) -> None:
    rows = list(rows)  # type: ignore[assignment]
    typer.echo(f"\n{title}")
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"  {name:<{width}}  {value}")


def machine(folder: Path) -> Rows:
    """Return interpreter, processors, memory, disk and accelerators."""
    import psutil
    import torch

    from ..utils.memory import gigabytes

    yield "python", platform.python_version()
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    memory = psutil.virtual_memory()
    yield "memory", f"{gigabytes(memory.total)}, {gigabytes(memory.available)} available"
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    yield "disk", f"{gigabytes(shutil.disk_usage(existing).free)} free under {existing}"
    if not torch.cuda.is_available():
        yield "device", "mps" if torch.backends.mps.is_available() else "cpu (PyTorch sees no CUDA device)"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use mixed_precision fp16"
        yield f"cuda:{index}", f"{properties.name}, {gigabytes(properties.total_memory)}, {bf16}"


def packages(registry: Registry) -> Rows:
    """Return the versions of what is required, and of what plugins can use."""
    from ..registry.registry import KINDS
    from ..utils.packages import missing

    for name in REQUIRED:
        yield name, _version(name)
    for kind in KINDS:
        for name in registry.names(kind):
            for package, install in missing(registry.get(kind, name).packages).items():
                yield package, f"missing; the {kind.replace('_', ' ')} {name} needs it: pip install '{install}'"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"missing; pip install {name}"


def credentials() -> Rows:
    """Return the accounts that are known; nothing requires one, and no secret is shown."""
    from huggingface_hub import get_token

    from ..storage.s3 import account

    yield "AWS", account()
    yield "Hugging Face", "a token is there" if get_token() else "no token (only push_to_hub and gated models need one)"


def accounts(configuration: Configuration, registry: Registry) -> Rows:
    """Return the origin of the credentials of each entry of the data file, in words."""
    for entry in (*configuration.datasets, *configuration.caches):
        backend = registry.get("data_backend", entry.type)
        said = backend(entry.backend).account if entry.backend is not None else ""
        yield f"data.{entry.id}", said or "none is needed"


def _planned(configuration: Configuration, registry: Registry) -> MemorySettings | None:
    from ..runs.planned_memory import planned_memory

    return planned_memory(configuration, registry)


def memory(settings: MemorySettings | None, configuration: Configuration, registry: Registry) -> Rows:
    """Return the estimate by purpose and by phase, what is free, whether it fits, and how much each remedy would save.

    Args:
        settings: Of the run; None where its family has no estimate.
        configuration: Of the run.
        registry: The run's plugins.
    """
    from ..runs.memory_verdict import CARDS, Verdict
    from ..utils.devices import resolve_device
    from ..utils.memory import OPTIONAL, estimate, free_memory_bytes, gigabytes, phases, savings

    device = resolve_device(configuration.run.device)
    if settings is None:
        yield "estimate", "not known for this family"
        return
    expected, free, found = estimate(settings), free_memory_bytes(device), phases(settings)
    for name, num_bytes in expected.parts().items():
        if num_bytes:
            yield name, f"{gigabytes(num_bytes)}{' (only where there is room)' if name in OPTIONAL else ''}"
    for phase, num_bytes in found.items():
        yield f"to {phase}", f"{gigabytes(num_bytes)}{' (the sum)' * (phase == 'train')}"
    largest, verdict = max(found, key=lambda phase: found[phase]), Verdict(configuration, registry, settings)
    yield "total", f"{gigabytes(found[largest])}: to {largest} takes most"
    yield "free", f"{gigabytes(free)} on {device}{': too little' if free < found[largest] else ''}"
    yield "verdict", verdict.line(free)
    for size in CARDS:
        yield f"{size} GB card", verdict.card(size)
    for label, saved in savings(settings, quantizers=True):
        yield "saves", f"{label}: about {gigabytes(saved)}"


def disk(configuration: Configuration, registry: Registry) -> Rows:
    """Return the room that the run's files will take, and what is free."""
    from ..runs.disk_plan import planned_disk
    from ..utils.disk import existing, free_bytes
    from ..utils.memory import gigabytes

    plan, folder = planned_disk(configuration, registry), configuration.run.output_dir
    if plan is None:
        yield "estimate", "not known for this family"
        return
    for name, num_bytes in plan.parts().items():
        yield name, gigabytes(num_bytes)
    free = free_bytes(folder)
    yield "total", f"{gigabytes(plan.total)} (without caches: their size depends on the data)"
    yield "free", f"{gigabytes(free)} under {existing(folder)}{': too little' if free < plan.total else ''}"
