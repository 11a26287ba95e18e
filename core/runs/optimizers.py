"""The optimizer settings of each network: the user's for it, then the method's for it, then the run's."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ..plugin_api.optimizer import OptimizerSettings
from ..settings.run_settings import RoleOptimizer

if TYPE_CHECKING:
    from ..plugin_api.method import Role
    from ..plugin_api.optimizer import OptimizerPlugin
    from ..settings.run_settings import RunSettings

T = TypeVar("T")


def of_role(role: Role, run: RunSettings, optimizer: type[OptimizerPlugin]) -> tuple[OptimizerSettings, float]:
    """Return a network's optimizer settings, and the norm that its gradient is clipped to (0: none).

    Args:
        role: The network, with the method's settings for it.
        run: The run's settings, with the user's for single networks.
        optimizer: One that finds its step size itself takes no learning rate of a method, which is AdamW's.
    """
    given = run.role_optimizers.get(role.name) or RoleOptimizer()
    beta1, beta2 = role.betas or (None, None)
    settings = OptimizerSettings(
        learning_rate=_first(own_learning_rate(role, run, optimizer), None, run.learning_rate),
        beta1=_first(given.adam_beta1, beta1, run.adam_beta1),
        beta2=_first(given.adam_beta2, beta2, run.adam_beta2),
        epsilon=run.adam_epsilon,
        weight_decay=_first(given.adam_weight_decay, role.weight_decay, run.adam_weight_decay),
        warmup_steps=run.lr_warmup_steps,
    )
    return settings, _first(given.max_grad_norm, role.max_grad_norm, run.max_grad_norm)


def own_learning_rate(role: Role, run: RunSettings, optimizer: type[OptimizerPlugin]) -> float | None:
    """Return the learning rate that is a network's own, the user's or the method's; None where it follows the run's,
    and those of its stages.
    """
    given = run.role_optimizers.get(role.name) or RoleOptimizer()
    return given.learning_rate or (None if optimizer.estimates_learning_rate else role.learning_rate)


def _first(given: T | None, method: T | None, run: T) -> T:
    return next((value for value in (given, method) if value is not None), run)
