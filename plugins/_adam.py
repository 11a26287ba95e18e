"""Arguments and options that several optimizers share."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..core.plugin_api.optimizer import OptimizerPlugin, OptimizerSettings


def adam_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """Return the arguments that every Adam takes by the same names."""
    return {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }


class LionConfig(OptimizerPlugin.Config):
    """Options of Lion. Its betas are not Adam's: the second smooths the momentum itself."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the momentum in the direction of a step."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the momentum per step; the paper's is 0.99, not Adam's 0.999."""


def lion_arguments(settings: OptimizerSettings, config: LionConfig) -> dict[str, Any]:
    """Return the arguments that every Lion takes by the same names."""
    return {
        "lr": settings.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": settings.weight_decay,
    }


LION_RATE = 0.2
"""Ratio of Lion's learning rate to AdamW's: all its steps have AdamW's largest size (arXiv 2302.06675: 3 to 10)."""
