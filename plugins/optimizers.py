"""Optimizers of the common kind: AdamW, StableAdamW and Lion (torch, torch-optimi, lion-pytorch), Adafactor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.optimizer import OptimizerPlugin, OptimizerSettings
from ._adam import LION_RATE, LionConfig, adam_arguments, lion_arguments

if TYPE_CHECKING:
    import torch

_FUSED_DEVICES = {"cuda", "cpu", "mps", "xpu"}


class AdamW(OptimizerPlugin):
    """AdamW (arXiv 1711.05101) by torch, as one fused kernel where the device has it."""

    name = "adamw"
    elementwise = True

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return one fused (elsewhere: foreach) AdamW."""
        import torch

        parameters = list(parameters)
        fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
        return torch.optim.AdamW(parameters, fused=fused or None, **adam_arguments(settings))


class OptimiAdamW(OptimizerPlugin):
    """AdamW by torch-optimi over float32 weights."""

    name = "optimi-adamw"
    elementwise = True
    packages: ClassVar = {"optimi": "torch-optimi"}

    class Config(OptimizerPlugin.Config):
        """Options of optimi's AdamW."""

        decouple_lr: bool = False
        """Weight decay fully decoupled from the learning rate; use a far smaller one then (1e-5 rather than 1e-2)."""

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return an optimi AdamW."""
        import optimi

        return optimi.AdamW(list(parameters), decouple_lr=self.config.decouple_lr, **adam_arguments(settings))


class AdamWBF16(OptimizerPlugin):
    """AdamW by torch-optimi over bfloat16 weights, with Kahan compensation of the rounding.

    The second moment is kept in float32: in bfloat16 (8 bits) a decay of ``beta2 = 0.999`` rounds to no decay at all,
    and the step size freezes after a few hundred steps.
    """

    name = "adamw_bf16"
    elementwise = True
    aliases = ("adamw-bf16",)
    packages: ClassVar = {"optimi": "torch-optimi"}
    parameter_dtype = "bfloat16"

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return an optimi AdamW with compensated weights."""
        return _compensated_adamw()(list(parameters), kahan_sum=True, **adam_arguments(settings))


def _compensated_adamw() -> Callable[..., torch.optim.Optimizer]:
    """Make the class here, since torch-optimi is imported late."""
    import optimi
    import torch

    class CompensatedAdamW(optimi.AdamW):
        def _init_state(self, group: dict[str, Any], state: dict[Any, Any], param: torch.Tensor) -> None:
            fresh = "kahan_comp" not in state
            super()._init_state(group, state, param)
            if fresh:
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)

    return CompensatedAdamW


class StableAdamW(OptimizerPlugin):
    """AdamW whose step is scaled down where the second moment lags behind (arXiv 2304.13013), by torch-optimi."""

    name = "stableadamw"
    aliases = ("optimi-stableadamw",)
    packages: ClassVar = {"optimi": "torch-optimi"}

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return an optimi StableAdamW."""
        import optimi

        return optimi.StableAdamW(list(parameters), **adam_arguments(settings))


class Adafactor(OptimizerPlugin):
    """Adafactor (arXiv 1804.04235) by transformers: second moments by row and column only."""

    name = "adafactor"
    honours = frozenset({"adam_weight_decay"})
    state_bytes = 0.1

    class Config(OptimizerPlugin.Config):
        """Options of Adafactor."""

        scale_parameter: bool = False
        """Whether steps are relative to the size of the weights; a LoRA starts at zero and would hardly move."""
        decay_rate: float = Field(default=-0.8, ge=-1, lt=0)
        """Exponent p of the second moment's decay, 1 - t^p at step t."""
        clip_threshold: float = Field(default=1.0, gt=0)
        """Root mean square above which an update is scaled down."""

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a transformers Adafactor with a fixed learning rate."""
        from transformers.optimization import Adafactor as Library

        return Library(
            list(parameters),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            relative_step=False,
            warmup_init=False,
            **self.config.model_dump(),
        )


class Lion(OptimizerPlugin):
    """Lion (arXiv 2302.06675) by lion-pytorch; wants a learning rate 3 to 10 times smaller than AdamW's."""

    name = "lion"
    elementwise = True
    packages: ClassVar = {"lion_pytorch": "lion-pytorch"}
    relative_learning_rate = LION_RATE
    honours = frozenset({"adam_weight_decay"})
    Config = LionConfig

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a lion-pytorch Lion."""
        from lion_pytorch import Lion as Library

        return Library(list(parameters), **lion_arguments(settings, self.config))


class OptimiLion(OptimizerPlugin):
    """Lion (arXiv 2302.06675) by torch-optimi over float32 weights."""

    name = "optimi-lion"
    elementwise = True
    packages: ClassVar = {"optimi": "torch-optimi"}
    relative_learning_rate = LION_RATE
    honours = frozenset({"adam_weight_decay"})
    Config = LionConfig

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return an optimi Lion."""
        import optimi

        return optimi.Lion(list(parameters), **lion_arguments(settings, self.config))


@hookimpl
def register_optimizers() -> Sequence[type[OptimizerPlugin]]:
    """Return the optimizers of this file."""
    return [AdamW, OptimiAdamW, AdamWBF16, StableAdamW, Adafactor, Lion, OptimiLion]
