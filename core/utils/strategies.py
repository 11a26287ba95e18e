"""The ways in which several processes divide a run's networks among each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

StrategyName = Literal["replicate", "fsdp", "zero2", "zero3"]
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)


@dataclass(frozen=True)
class Division:
    """How processes divide a run's networks among each other.

    Attributes:
        strategy: The strategy.
        num_processes: Number of processes.
        shard_size: Number of processes that share one copy of the weights; 0: all.
        offload: Whether what is divided lies on the host.
    """

    strategy: StrategyName
    num_processes: int
    shard_size: int = 0
    offload: bool = False

    @property
    def num_shards(self) -> int:
        """Number of processes among which a copy of the weights is divided."""
        return self.shard_size or self.num_processes
