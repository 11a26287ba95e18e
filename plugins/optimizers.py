"""Optimizers, each from a library: AdamW (torch), bf16 AdamW and Lion (torch-optimi), Lion (lion-pytorch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..core.hookspecs import hookimpl
from ..core.optimizer import OptimizerPlugin, OptimizerSettings

if TYPE_CHECKING:
    import torch

_FUSED_DEVICES = {"cuda", "cpu", "mps", "xpu"}


class AdamW(OptimizerPlugin):
    """AdamW (arXiv 1711.05101) by torch, as one fused kernel where the device has it."""

    name = "adamw"

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """One fused (elsewhere: foreach) AdamW."""
        import torch

        parameters = list(parameters)
        fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
        return torch.optim.AdamW(parameters, fused=fused or None, **_adam_arguments(settings))


class OptimiAdamW(OptimizerPlugin):
    """AdamW by torch-optimi over float32 weights."""

    name = "optimi-adamw"
    packages: ClassVar = {"optimi": "torch-optimi"}

    class Config(OptimizerPlugin.Config):
        """Options of optimi's AdamW."""

        decouple_lr: bool = False
        """Weight decay fully decoupled from the learning rate; then it is to be far smaller (1e-5 rather than 1e-2)."""

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """An optimi AdamW."""
        import optimi

        return optimi.AdamW(list(parameters), decouple_lr=self.config.decouple_lr, **_adam_arguments(settings))


class AdamWBF16(OptimizerPlugin):
    """AdamW by torch-optimi over bfloat16 weights, with Kahan compensation of the rounding.

    The second moment is kept in float32: in bfloat16 (8 bits) a decay of ``beta2 = 0.999`` rounds to no decay at all,
    and the step size freezes after a few hundred steps.
    """

    name = "adamw_bf16"
    aliases = ("adamw-bf16",)
    packages: ClassVar = {"optimi": "torch-optimi"}
    parameter_dtype = "bfloat16"

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """An optimi AdamW with compensated weights."""
        return _compensated_adamw()(list(parameters), kahan_sum=True, **_adam_arguments(settings))


def _compensated_adamw() -> Callable[..., torch.optim.Optimizer]:
    """The class is made here, since torch-optimi is imported late."""
    import optimi
    import torch

    class CompensatedAdamW(optimi.AdamW):
        def _init_state(self, group: dict[str, Any], state: dict[Any, Any], param: torch.Tensor) -> None:
            fresh = "kahan_comp" not in state
            super()._init_state(group, state, param)
            if fresh:
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)

    return CompensatedAdamW


class LionConfig(OptimizerPlugin.Config):
    """Options of Lion. Its betas are not Adam's: the second smooths the momentum itself."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the momentum in the direction of a step."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the momentum per step; the paper's is 0.99, not Adam's 0.999."""


class Lion(OptimizerPlugin):
    """Lion (arXiv 2302.06675) by lion-pytorch; wants a learning rate 3 to 10 times smaller than AdamW's."""

    name = "lion"
    packages: ClassVar = {"lion_pytorch": "lion-pytorch"}
    honours = frozenset({"adam_weight_decay"})
    Config = LionConfig

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """A lion-pytorch Lion."""
        from lion_pytorch import Lion as Library

        return Library(list(parameters), **_lion_arguments(settings, self.config))


class OptimiLion(OptimizerPlugin):
    """Lion (arXiv 2302.06675) by torch-optimi over float32 weights."""

    name = "optimi-lion"
    packages: ClassVar = {"optimi": "torch-optimi"}
    honours = frozenset({"adam_weight_decay"})
    Config = LionConfig

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """An optimi Lion."""
        import optimi

        return optimi.Lion(list(parameters), **_lion_arguments(settings, self.config))


def _adam_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }


def _lion_arguments(settings: OptimizerSettings, config: LionConfig) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": settings.weight_decay,
    }


@hookimpl
def register_optimizers() -> Sequence[type[OptimizerPlugin]]:
    """The optimizers of this module."""
    return [AdamW, OptimiAdamW, AdamWBF16, Lion, OptimiLion]
