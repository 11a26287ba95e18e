"""The contract of an optimizer plugin: a name, its options and how to build it from a library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    warmup_steps: int = 0
    """Number of warm-up steps, for a :attr:`OptimizerPlugin.schedule_free` optimizer to do itself."""


class UpdatePolicy:
    """How a built optimizer is saved, restored and set aside for evaluation; serves torch's own optimizers."""

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return all that decides the next steps: numbers, texts and plain tensors in dicts, lists and tuples."""
        return optimizer.state_dict()

    def load(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned, bit for bit."""
        from ..utils.tensor_tree import load_optimizer

        load_optimizer(optimizer, state)

    @contextmanager
    def evaluating(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Hold, inside the block, the parameters to validate, score and export; restore them bit for bit afterwards."""
        yield


class OptimizerPlugin(UpdatePolicy, ABC):
    """Builds a torch optimizer."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> name to pip install."""
    honours: ClassVar[frozenset[str]] = frozenset({"adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay"})
    """The run's ``adam_*`` keys that it supports; the others are refused when they are set by the user."""
    parameter_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"
    """Type of the trained weights: bfloat16 for optimizers that compensate the rounding themselves."""

    default_learning_rate: ClassVar[float | None] = None
    """Learning rate where the user gives none; None means AdamW's times `relative_learning_rate`."""
    relative_learning_rate: ClassVar[float] = 1.0
    """Ratio of its learning rates to AdamW's, where the user gives none."""
    estimates_learning_rate: ClassVar[bool] = False
    """Whether it finds its step size itself, so that ``learning_rate`` is a factor on that, near 1."""
    schedule_free: ClassVar[bool] = False
    """Whether it averages its weights instead of following a schedule: it gets no schedule, and warms up itself."""
    elementwise: ClassVar[bool] = False
    """Whether the step of a weight depends on that weight's gradient and state alone, so that each process of several
    can step its part of a sharded network."""
    state_bytes: ClassVar[float | None] = None
    """Bytes of state per trained weight, for estimates; None means two numbers of the weight's own type."""

    class Config(BaseModel):
        """Further options, under ``optimizer_config``."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`."""
