"""The strategy that a run and its launcher ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..utils.strategies import ParallelSettings
from .strategy import Strategy

if TYPE_CHECKING:
    from ..utils.strategies import StrategyName
    from .processes import Processes


def parallel_settings(
    name: Literal["auto"] | StrategyName, *, shard_size: int, offload: bool, environment: Mapping[str, str]
) -> ParallelSettings:
    """Return what the configuration and the launcher ask for.

    Args:
        name: The run's ``parallel``; ``auto`` follows the launcher.
        shard_size: The run's ``parallel_shard_size``.
        offload: The run's ``parallel_offload``.
        environment: Variables of this process, some of which ``accelerate launch`` sets.

    Raises:
        UserError: The two ask for different strategies, or for something that is none.
    """
    launched, launched_offload = launched_strategy(environment)
    if launched is not None and name not in ("auto", launched):
        raise UserError(
            f"parallel = {name}, and the processes were launched by accelerate for {launched}",
            f"set parallel to {launched} (or auto), or launch without it",
        )
    chosen: StrategyName = launched or ("replicate" if name == "auto" else name)
    if shard_size and chosen != "fsdp":
        raise UserError(f"parallel_shard_size = {shard_size} belongs to fsdp, not to {chosen}", "leave it out")
    if offload and chosen == "replicate":
        raise UserError("parallel_offload: nothing is sharded under replicate", "leave it out, or set parallel: fsdp")
    return ParallelSettings(chosen, shard_size, offload or launched_offload)


def launched_strategy(environment: Mapping[str, str]) -> tuple[StrategyName | None, bool]:
    """Return the strategy that ``accelerate launch`` was configured for, and whether it offloads."""
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        return "fsdp", _is_set(environment, "FSDP_OFFLOAD_PARAMS")
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("2", "3"):
            raise UserError(
                f"accelerate launch --use_deepspeed --zero_stage {stage}: stages 2 and 3 are there",
                "launch with --zero_stage 2 or 3, or without --use_deepspeed",
            )
        keys = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
        return "zero2" if stage == "2" else "zero3", any(environment.get(key, "none") == "cpu" for key in keys)
    return None, False


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")


def build_strategy(processes: Processes, settings: ParallelSettings) -> Strategy:
    """Return the strategy of these settings. Raises UserError where its package is missing."""
    if settings.name == "fsdp":
        from .fsdp import FullyShard

        return FullyShard(processes, settings)
    if settings.name in ("zero2", "zero3"):
        from .zero import Zero

        return Zero(processes, settings)
    return Strategy(processes, settings)
