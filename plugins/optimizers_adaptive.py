"""Optimizers that need no schedule or no learning rate: schedule-free AdamW (schedulefree), Prodigy (prodigyopt)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.optimizer import OptimizerPlugin, OptimizerSettings
from ._adam import adam_arguments

if TYPE_CHECKING:
    import torch


class ScheduleFreeAdamW(OptimizerPlugin):
    """AdamW over an average of its iterates in place of a schedule (arXiv 2405.15682), by schedulefree.

    Gradients are taken between the average x and the iterate z, at the point that the parameters hold in training; x is
    validated and exported. Checkpoints hold the former, so that a resumed run continues bit for bit.
    """

    name = "schedulefree-adamw"
    elementwise = True
    aliases = ("adamw-schedulefree", "adamw_schedulefree")
    packages: ClassVar = {"schedulefree": "schedulefree>=1.4"}
    schedule_free = True

    class Config(OptimizerPlugin.Config):
        """Options of the average."""

        r: float = Field(default=0.0, ge=0, le=10)
        """Power of the step by which later iterates weigh more."""
        weight_lr_power: float = Field(default=2.0, ge=0, le=10)
        """Power of the learning rate by which iterates of the warm-up weigh less."""

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a schedulefree AdamW in train mode, which warms up itself."""
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(
            list(parameters),
            warmup_steps=settings.warmup_steps,
            **self.config.model_dump(),
            **adam_arguments(settings),
        )
        optimizer.train()
        return optimizer

    @contextlib.contextmanager
    def evaluating(self, optimizer: Any) -> Iterator[None]:
        """Put the average in the parameters' place inside the block; restore a copy, since the library rounds."""
        import torch

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept = [parameter.detach().clone() for parameter in parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)


class Prodigy(OptimizerPlugin):
    """Adam that finds its step size itself (arXiv 2306.06101), by prodigyopt: learning_rate stays at 1."""

    name = "prodigy"
    packages: ClassVar = {"prodigyopt": "prodigyopt>=1.1"}
    default_learning_rate = 1.0
    estimates_learning_rate = True
    state_bytes = 16.0

    class Config(OptimizerPlugin.Config):
        """Options of the estimate."""

        d0: float = Field(default=1e-6, gt=0, le=1)
        """Step size that the estimate begins at; it grows from there."""
        d_coef: float = Field(default=1.0, gt=0, le=100)
        """Factor on the estimate, for larger or smaller steps."""
        growth_rate: float = Field(default=1e30, gt=1)
        """Largest factor by which the estimate grows per step; 1.02 warms up."""
        use_bias_correction: bool = True
        """Whether Adam's bias is corrected: smaller first steps."""
        slice_p: int = Field(default=1, ge=1)
        """The estimate uses every slice_p-th weight: 11 saves a good half of its memory."""

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a prodigyopt Prodigy with decoupled weight decay, safe under a warm-up."""
        from prodigyopt import Prodigy as Library

        with contextlib.redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
            return Library(
                list(parameters),
                safeguard_warmup=settings.warmup_steps > 0,
                **self.config.model_dump(),
                **adam_arguments(settings),
            )


@hookimpl
def register_optimizers() -> Sequence[type[OptimizerPlugin]]:
    """Return the optimizers of this file."""
    return [ScheduleFreeAdamW, Prodigy]
