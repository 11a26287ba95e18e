"""The memory of each of several processes, by strategy: a part of `distill doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

from ..errors import UserError
from ..utils.strategies import STRATEGIES, Division, ParallelSettings, StrategyName

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..settings.run_settings import RunSettings
    from ..utils.memory import MemorySettings
    from ..utils.process_memory import ProcessMemory

CARDS = (24, 48, 80)
"""Memory of common cards, in GB."""


def require_number(processes: int | None, *, asked: bool) -> None:
    """Raise UserError where options for several processes were given without their number."""
    if processes is None and asked:
        raise UserError(
            "--parallel, --shard-size and --offload say how processes share the networks: how many are they?",
            "add --processes N",
        )


def divisions(
    run: RunSettings, parallel: StrategyName | None, *, processes: int, shard_size: int, offload: bool
) -> Sequence[Division]:
    """Return how the processes may share the networks: by the one strategy that is named, or by each of them.

    Args:
        run: Its keys count where an option was not given.
        parallel: The strategy, if one was given.
        processes: Number of processes.
        shard_size: Number of those that share one copy; 0: all.
        offload: Whether what they share lies on the host.
    """
    chosen = parallel or (None if run.parallel == "auto" else run.parallel)
    names: Sequence[StrategyName] = [chosen] if chosen else STRATEGIES
    shard_size, offload = shard_size or run.parallel_shard_size, offload or run.parallel_offload
    return [Division(ParallelSettings(name, shard_size, offload), processes) for name in names]


def processes_rows(
    settings: MemorySettings, chosen: Sequence[Division], configuration: Configuration, registry: Registry
) -> Iterator[tuple[str, str]]:
    """Yield the memory of each process: by purpose for one strategy, in a line of a table for each of several.

    Raises:
        UserError: The run cannot be divided in the one way that was asked for.
    """
    from ..utils.process_memory import process_memory

    run, number = configuration.run, chosen[0].num_processes
    samples = f"{number} x {run.train_batch_size} x {run.gradient_accumulation_steps}"
    total = number * run.train_batch_size * run.gradient_accumulation_steps
    yield "step", f"{samples} = {total} samples (processes x train_batch_size x gradient_accumulation_steps)"
    problems = {division: _problem(settings, division, configuration, registry) for division in chosen}
    if len(chosen) == 1 and (problem := problems[chosen[0]]):
        raise UserError(f"--parallel {chosen[0].strategy}: {problem}")
    found = {division: process_memory(settings, division) for division in chosen if problems[division] is None}
    if len(chosen) == 1:
        yield from _by_purpose(found[chosen[0]])
    else:
        yield from _table(found, {one.strategy: problem for one, problem in problems.items() if problem})
    yield from _fitting(found, run.device)
    if not chosen[0].settings.offload:
        yield from _offloaded(settings, found)


def _problem(
    settings: MemorySettings, division: Division, configuration: Configuration, registry: Registry
) -> str | None:
    """Return why the run cannot be divided in this way; None where it can. Packages may be missing here."""
    from ..engine.parallel import build_strategy
    from ..runs.builders import build_family, build_method
    from ..utils.process_memory import division_problem

    problem = division_problem(settings, division)
    if problem is not None:
        return problem
    run, processes = configuration.run, SimpleNamespace(world_size=division.num_processes)
    strategy = build_strategy(processes, division.settings)  # type: ignore[arg-type]
    method = build_method(configuration, registry, build_family(configuration, registry))
    try:
        strategy.check(
            model_type=run.model_type,
            optimizer=registry.get("optimizer", run.optimizer),
            quantised=run.frozen_base_precision != "no_change",
            mixed_precision=run.mixed_precision,
        )
        strategy.check_method(run.distillation_method, method.requires(method.config, method.setup))
    except UserError as error:
        return error.message
    return None


def _by_purpose(memory: ProcessMemory) -> Iterator[tuple[str, str]]:
    from ..utils.memory import gigabytes

    for purpose, num_bytes in memory.parts.items():
        yield purpose, gigabytes(num_bytes)
    yield "total", f"{gigabytes(memory.total)} on each process (activations are rough)"
    if memory.host:
        yield "host", f"{gigabytes(memory.host)} of each process in the machine's memory"


def _table(found: dict[Division, ProcessMemory], refused: dict[StrategyName, str]) -> Iterator[tuple[str, str]]:
    """Yield a row for each strategy, with what is the same for all of them in one column."""
    from ..utils.memory import gigabytes
    from ..utils.process_memory import SHARED

    columns = (*SHARED, "gathered", "other", "total", "host")
    yield "on each", "".join(f"{name:>11}" for name in columns)
    for division, memory in found.items():
        shown = {name: memory.parts[name] for name in (*SHARED, "gathered")}
        cells = (*shown.values(), memory.total - sum(shown.values()), memory.total, memory.host)
        yield division.strategy, "".join(f"{gigabytes(cell):>11}" for cell in cells)
    yield from refused.items()


def _fitting(found: dict[Division, ProcessMemory], device: str) -> Iterator[tuple[str, str]]:
    """Yield which strategies fit the devices that are here, and cards of common sizes."""
    from ..utils.devices import resolve_device
    from ..utils.memory import free_memory_bytes, gigabytes

    totals: dict[StrategyName, int] = {division.strategy: memory.total for division, memory in found.items()}
    here, number = resolve_device(device), next(iter(found)).num_processes
    on_card = here.startswith("cuda")
    free = free_memory_bytes(here) if on_card else free_memory_bytes(here) // number
    shared = "" if on_card or number == 1 else f" for each of {number} processes"
    yield "free", f"{gigabytes(free)} on {here}{shared}: {_names(totals, free)}"
    yield "cards", "; ".join(f"{size} GB: {_names(totals, size * 1e9)}" for size in CARDS)


def _names(totals: dict[StrategyName, int], size: float) -> str:
    fitting = [strategy for strategy, total in totals.items() if total <= size]
    return f"{', '.join(fitting)} fit{'s' * (len(fitting) == 1)}" if fitting else "too little"


def _offloaded(settings: MemorySettings, found: dict[Division, ProcessMemory]) -> Iterator[tuple[str, str]]:
    """Yield what offloading would leave on the card, for strategies that divide something."""
    from dataclasses import replace

    from ..utils.memory import gigabytes
    from ..utils.process_memory import process_memory

    for division in found:
        if division.strategy != "replicate":
            memory = process_memory(settings, replace(division, settings=replace(division.settings, offload=True)))
            said = f"{gigabytes(memory.total)} on the card, {gigabytes(memory.host)} of the machine's memory"
            yield "--offload", f"{division.strategy}: {said}"
