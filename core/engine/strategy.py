"""How several processes share the networks of a run: replicated here, sharded in modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..errors import UserError
from .optimize import RoleOptimizer

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from ..plugin_api.optimizer import OptimizerPlugin
    from .networks import Networks
    from .processes import Processes

BuildOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class ParallelSettings:
    """What was asked for.

    Attributes:
        name: ``replicate``, ``fsdp``, ``zero2`` or ``zero3``.
        shard_size: Number of processes that share one copy of the weights; 0 for all.
        offload: Keep in host memory what is sharded.
    """

    name: str = "replicate"
    shard_size: int = 0
    offload: bool = False


class Strategy:
    """The base of every network on each process; gradients are averaged after the backward pass.

    Args:
        processes: Those of the run.
        settings: What was asked for.
    """

    name: ClassVar[str] = "replicate"
    lockstep: ClassVar[bool] = False
    """Whether a forward pass needs all processes, so that validation, scores and export run on each of them."""

    def __init__(self, processes: Processes, settings: ParallelSettings) -> None:
        self.processes, self.settings = processes, settings

    @property
    def described(self) -> str:
        """The strategy in a few words, for logs."""
        return "the base on each, gradients averaged"

    def check(self, *, model_type: str, optimizer: type[OptimizerPlugin], quantised: bool) -> None:
        """Raise UserError where the strategy cannot be that of such a run, before weights load."""

    def place(self, networks: Networks, family: ModelFamily) -> None:
        """Bring the networks, which are complete by now, into the form in which they are trained."""

    def optimizer(self, role: str, networks: Networks, build: BuildOptimizer, **settings: Any) -> RoleOptimizer:
        """Return the optimizer of a role.

        Args:
            role: A trained role.
            networks: Placed.
            build: Makes a torch optimizer over parameters.
            settings: Further arguments of :class:`RoleOptimizer`.
        """
        parameters = networks.parameters(role)
        return RoleOptimizer(build(parameters), parameters, **settings)

    def scaler(self, role: str, networks: Networks) -> torch.amp.GradScaler:
        """Return the scaler of a role's loss in a run of fp16."""
        return torch.amp.GradScaler(self.processes.device.type)

    @contextmanager
    def exported(self, networks: Networks, role: str) -> Iterator[nn.Module | None]:
        """Give the role's network with whole weights, for export; None on processes that do not write.

        Every process that enters must do so together where the strategy is in :attr:`lockstep`.
        """
        with networks.use(role) as network:
            yield network


def parallel_settings(name: str, *, shard_size: int, offload: bool, environment: Mapping[str, str]) -> ParallelSettings:
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
    chosen = launched or ("replicate" if name == "auto" else name)
    if shard_size and chosen != "fsdp":
        raise UserError(f"parallel_shard_size = {shard_size} belongs to fsdp, not to {chosen}", "leave it out")
    if offload and chosen == "replicate":
        raise UserError("parallel_offload: nothing is sharded under replicate", "leave it out, or set parallel: fsdp")
    return ParallelSettings(chosen, shard_size, offload or launched_offload)


def launched_strategy(environment: Mapping[str, str]) -> tuple[str | None, bool]:
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
        return f"zero{stage}", any(environment.get(key, "none") == "cpu" for key in keys)
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
