"""Memory of each of several processes, by the strategy with which they divide a run's networks.

With N processes that share one copy, and what is trained by roles of whole networks (*full*) apart from adapters and
heads, which every process holds:

    strategy    base    full weights    gradients    optimizer    averages    beside them
    replicate   1       1               1            1            1           -
    fsdp        1 / N   1 / N           1 / N        1 / N        1 / N       two blocks gathered whole, and the rest
    zero2       1       1               1 / N        1 / N + copy 1           a bucket of gradients
    zero3       1 / N   1 / N           1 / N        1 / N + copy 1 / N       a bucket, and the weights in use

Activations, the autoencoder, auxiliary networks and the process itself are the same on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .memory import MemoryEstimate, MemorySettings, cast_bytes, estimate, needed, phases
from .strategies import Division, StrategyName

SHARED = ("weights", "trained", "gradients", "optimizer", "averages")
"""Purposes of memory that processes can divide among each other."""
DIVIDED: Mapping[StrategyName, tuple[str, ...]] = {
    "replicate": (),
    "fsdp": (*SHARED, "checkpoint_copy"),
    "zero2": ("gradients", "optimizer"),
    "zero3": SHARED,
}
"""Strategy -> what of full roles (and, for ``weights``, of the base) is divided, and is on the host when offloaded."""
GATHERED_UNITS = 2
"""Blocks that are whole at a time under fsdp: the one that is computed, and the next one on its way. What lies outside
of the blocks stays gathered from pass to pass, in each network."""
ZERO_BUCKET = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``: gradients, in elements, that are exchanged at once."""
ZERO_LIVE = 1_000_000_000
"""DeepSpeed's default ``stage3_max_live_parameters``: weights, in elements, that are whole at a time under zero3."""


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process.

    Attributes:
        parts: Bytes on the device by purpose.
        host: Bytes that lie on the host instead.
    """

    parts: Mapping[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Sum of the bytes on the device, without what is optional."""
        return needed(self.parts)


def division_problem(settings: MemorySettings, division: Division) -> str | None:
    """Return why a run cannot be divided in this way; None where it can."""
    zero = division.strategy.startswith("zero")
    if zero and not settings.full_roles:
        return "it divides networks that are trained whole, and this run trains adapters: use replicate or fsdp"
    if division.settings.offload and division.strategy == "replicate":
        return "it divides nothing that could be offloaded: use fsdp, or a zero strategy for full training"
    if division.num_processes % division.num_shards:
        return f"{division.num_processes} processes are not a multiple of the {division.num_shards} that share one copy"
    if zero and division.num_shards != division.num_processes:
        return "it divides among all processes: leave the shard size out, or use fsdp"
    return None


def process_memory(settings: MemorySettings, division: Division) -> ProcessMemory:
    """Estimate the peak memory of one process; activations are rough (a factor of two either way)."""
    small = estimate(_of_adapters(settings))
    full = _of_full_roles(settings, division)
    divided = DIVIDED[division.strategy]
    parts, host = small.parts(), 0
    for purpose, own in full.items():
        if purpose in divided:
            own = -(-own // division.num_shards)
            if division.settings.offload:
                own, host = 0, host + own
        parts[purpose] += own
    if "trained" not in divided:  # else whole weights are there, and are cast, a block at a time
        parts["casts"] += cast_bytes(settings) - small.casts
    parts["gathered"] = _gathered_bytes(settings, division)
    return ProcessMemory(parts, host)


def process_peak(settings: MemorySettings, division: Division) -> int:
    """Return the bytes on the device of one process, in the phase of the run that takes most."""
    return max(phases(settings, process_memory(settings, division).parts).values())


def process_total(settings: MemorySettings, division: Division) -> int:
    """Return the bytes on the device of one process."""
    return process_memory(settings, division).total


def _of_adapters(settings: MemorySettings) -> MemorySettings:
    """Return the settings of what every process holds: without base and full roles."""
    return replace(
        settings,
        base_bytes=0,
        trained_parameters=settings.trained_parameters - settings.full_parameters,
        full_parameters=0,
        full_roles=0,
        idle_parameters=0,
        largest_role=0 if settings.full_roles and settings.largest_role is not None else settings.largest_role,
        averaged_parameters=settings.averaged_parameters - settings.averaged_full_parameters,
    )


def _of_full_roles(settings: MemorySettings, division: Division) -> dict[str, int]:
    """Return the bytes, over all processes, of the base and of the full roles."""
    largest = settings.largest_role
    if largest is not None:  # zero3 keeps a buffer of each role's
        largest = settings.full_parameters if division.strategy == "zero3" else min(largest, settings.full_parameters)
    whole: MemoryEstimate = estimate(
        replace(
            settings,
            trained_parameters=settings.full_parameters,
            largest_role=largest,
            idle_parameters=0 if division.strategy.startswith("zero") else settings.idle_parameters,
            averaged_parameters=settings.averaged_full_parameters,
        )
    )
    parts = {purpose: whole.parts()[purpose] for purpose in (*SHARED, "checkpoint_copy")}
    if division.strategy.startswith("zero"):
        parts["optimizer"] += parts["trained"]  # DeepSpeed steps a copy of its own of the weights
    return parts


def _gathered_bytes(settings: MemorySettings, division: Division) -> int:
    """Return the bytes of weights that are whole for a moment, and of gradients on their way."""
    if division.strategy == "replicate":
        return 0
    if division.strategy == "fsdp":
        blocks = GATHERED_UNITS * settings.largest_unit
        of_full = 2 * blocks * settings.trained_bytes if settings.full_roles else 0  # weights, and their gradients
        stays = settings.outside_units * (settings.base_bytes + settings.full_roles * settings.trained_bytes)
        return round(stays + max(blocks * settings.base_bytes, of_full))
    of_role = settings.full_parameters // settings.full_roles
    bucket = min(ZERO_BUCKET, of_role)
    if division.strategy == "zero2":
        return round(bucket * settings.trained_bytes)
    live = min(ZERO_LIVE, of_role)
    return round((settings.full_roles * bucket + live) * settings.trained_bytes)
