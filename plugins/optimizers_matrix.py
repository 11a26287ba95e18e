"""Optimizers that treat a weight as a matrix: Muon and SOAP (pytorch-optimizer)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.optimizer import OptimizerPlugin, OptimizerSettings
from ._adam import adam_arguments

if TYPE_CHECKING:
    import torch

PACKAGES = {"pytorch_optimizer": "pytorch-optimizer>=4.1"}


class Muon(OptimizerPlugin):
    """Momentum made orthogonal (arXiv 2502.16982) for matrices, AdamW for all other weights, by pytorch-optimizer.

    Updates of matrices are scaled to the size of AdamW's, so one learning rate serves both. A LoRA's convolutions and
    everything that is not of two dimensions go to AdamW.
    """

    name = "muon"
    packages: ClassVar = PACKAGES
    state_bytes = 4.0

    class Config(OptimizerPlugin.Config):
        """Options of the momentum."""

        momentum: float = Field(default=0.95, ge=0, lt=1)
        """Decay of the momentum per step."""
        nesterov: bool = True
        """Whether the gradient is added to the momentum once more."""
        ns_steps: int = Field(default=5, ge=1, le=20)
        """Newton-Schulz iterations that make a matrix orthogonal."""

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a pytorch-optimizer Muon over two groups."""
        from pytorch_optimizer import Muon as Library

        adam = adam_arguments(settings)
        shared = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        weights = list(parameters)
        matrices = [weight for weight in weights if weight.ndim == 2]
        others = [weight for weight in weights if weight.ndim != 2]
        groups: list[dict[str, Any]] = []
        if matrices:
            groups.append({"params": matrices, "use_muon": True, **shared, **self.config.model_dump()})
        if others:
            groups.append({"params": others, "use_muon": False, **adam})
        return Library(groups, use_adjusted_lr=True, foreach=False)


class Soap(OptimizerPlugin):
    """Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321), by pytorch-optimizer."""

    name = "soap"
    packages: ClassVar = PACKAGES
    state_bytes = 16.0

    class Config(OptimizerPlugin.Config):
        """Options of the preconditioner."""

        shampoo_beta: float = Field(default=0.95, ge=0, lt=1)
        """Decay of its statistics per step."""
        precondition_frequency: int = Field(default=10, ge=1)
        """Optimizer steps between new eigenbases."""
        max_precondition_dim: int = Field(default=256, ge=1)
        """Longer dimensions are left as they are: each costs two square matrices of its length."""
        normalize_gradient: bool = False
        """Whether each update is scaled to a root mean square of 1."""

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a pytorch-optimizer SOAP."""
        from pytorch_optimizer import SOAP as Library

        return Library(list(parameters), **self.config.model_dump(), **adam_arguments(settings))


@hookimpl
def register_optimizers() -> Sequence[type[OptimizerPlugin]]:
    """Return the optimizers of this file."""
    return [Muon, Soap]
