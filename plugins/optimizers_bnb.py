"""Optimizers by bitsandbytes, whose moments are 8-bit numbers in blocks (arXiv 2110.02861)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.optimizer import OptimizerPlugin, OptimizerSettings
from ._adam import LION_RATE, LionConfig, adam_arguments, lion_arguments

if TYPE_CHECKING:
    import torch

PACKAGES = {"bitsandbytes": "bitsandbytes>=0.46"}
MIN_8BIT_SIZE = "Weights with fewer numbers than this keep float32 moments."


class BnbAdamW8bit(OptimizerPlugin):
    """AdamW with 8-bit moments, by bitsandbytes."""

    name = "bnb-adamw8bit"
    packages: ClassVar = PACKAGES
    state_bytes = 2.0

    class Config(OptimizerPlugin.Config):
        """Options of 8-bit moments."""

        min_8bit_size: int = Field(default=4096, ge=1, description=MIN_8BIT_SIZE)

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a bitsandbytes AdamW8bit."""
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(list(parameters), min_8bit_size=self.config.min_8bit_size, **adam_arguments(settings))


class BnbLion8bit(OptimizerPlugin):
    """Lion with an 8-bit momentum, by bitsandbytes."""

    name = "bnb-lion8bit"
    packages: ClassVar = PACKAGES
    relative_learning_rate = LION_RATE
    honours = frozenset({"adam_weight_decay"})
    state_bytes = 1.0

    class Config(LionConfig):
        """Options of Lion and of an 8-bit momentum."""

        min_8bit_size: int = Field(default=4096, ge=1, description=MIN_8BIT_SIZE)

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a bitsandbytes Lion8bit."""
        from bitsandbytes.optim import Lion8bit

        arguments: dict[str, Any] = lion_arguments(settings, self.config)
        return Lion8bit(list(parameters), min_8bit_size=self.config.min_8bit_size, **arguments)


@hookimpl
def register_optimizers() -> Sequence[type[OptimizerPlugin]]:
    """Return the optimizers of this file."""
    return [BnbAdamW8bit, BnbLion8bit]
