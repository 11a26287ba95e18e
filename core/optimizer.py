"""The contract of an optimizer plugin: a name, its options and how to build it from a library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings that every optimizer shares."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


class OptimizerPlugin(ABC):
    """Builds a torch optimizer."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> what to pip install."""
    honours: ClassVar[frozenset[str]] = frozenset({"adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay"})
    """Which of the run's ``adam_*`` keys it has; the others are refused when they are set by the user."""
    parameter_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"
    """Type of the trained weights: bfloat16 for optimizers that compensate the rounding themselves."""

    class Config(BaseModel):
        """Further options, under ``optimizer_config``."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
