"""The ways in which several processes divide a run's networks among each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

StrategyName = Literal["replicate", "fsdp", "zero2", "zero3"]
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)


@dataclass(frozen=True)
class ParallelSettings:
    """How the processes of a run are to share its networks.

    Attributes:
        name: The strategy.
        shard_size: Number of processes that share one copy of the weights; 0: all.
        offload: Whether what is divided lies on the host.
    """

    name: StrategyName = "replicate"
    shard_size: int = 0
    offload: bool = False


@dataclass(frozen=True)
class Division:
    """How so many processes share a run's networks.

    Attributes:
        settings: The way in which they do.
        num_processes: Number of processes.
    """

    settings: ParallelSettings
    num_processes: int

    @property
    def strategy(self) -> StrategyName:
        """The strategy's name."""
        return self.settings.name

    @property
    def num_shards(self) -> int:
        """Number of processes among which a copy of the weights is divided."""
        return self.settings.shard_size or self.num_processes
