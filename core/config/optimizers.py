"""Checks of the optimizer settings of single networks: those that the user names, and those that the method has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..settings.run_settings import RunSettings
from ..utils.suggest import did_you_mean
from .parts import ADAM_KEYS, FACTORS

if TYPE_CHECKING:
    from ..plugin_api.method import Method, Role
    from ..plugin_api.optimizer import OptimizerPlugin
    from .reading import ConfigReport

KEY = "role_optimizers"


def check_role_optimizers(
    method: type[Method],
    method_config: Any,
    run: RunSettings,
    optimizer: type[OptimizerPlugin] | None,
    report: ConfigReport,
) -> None:
    """Check that each network named exists, and that the optimizer honours what is set for it.

    Args:
        method: The chosen method.
        method_config: Its validated configuration.
        run: The run's settings.
        optimizer: The chosen optimizer, where there is such a one.
        report: Takes findings and notices.
    """
    from ..engine.returned import roles_of
    from ..plugin_api.method import MethodSetup

    roles = roles_of(method, method_config, MethodSetup(run.model_type, use_ema=run.use_ema))
    trained = {role.name: role for role in roles if role.trains != "none"}
    for name, settings in run.role_optimizers.items():
        given = settings.model_dump(exclude_none=True)
        if name not in trained:
            problem = f"is no network that the method {method.name!r} trains here"
            remedy = f"{did_you_mean(name, list(trained))}it trains: {', '.join(trained)}"
            report.refuse(f"{KEY}.{name}", given, problem, remedy)
        elif optimizer is not None:
            _check_honoured(f"{KEY}.{name}", given, optimizer, report)
    for name, role in trained.items():
        if own := list(own_settings(role, optimizer)):
            report.note(
                f"{name} is trained with {', '.join(own)}: {method.name}'s own, whatever the run's keys are "
                f"({KEY}.{name} changes them)"
            )


def _check_honoured(path: str, given: dict[str, float], optimizer: type[OptimizerPlugin], report: ConfigReport) -> None:
    for key, value in given.items():
        if key in ADAM_KEYS and key not in optimizer.honours:
            problem = f"is not honoured: the optimizer {optimizer.name!r} has no such setting"
            report.refuse(f"{path}.{key}", value, problem, "leave it out, or see optimizer_config")
    rate, (low, high) = given.get("learning_rate"), FACTORS
    if rate is not None and optimizer.estimates_learning_rate and not low <= rate <= high:
        problem = f"is a factor on the step size that {optimizer.name!r} finds itself, so near 1"
        report.refuse(f"{path}.learning_rate", rate, problem, "set it to 1, or leave it out")


def own_settings(role: Role, optimizer: type[OptimizerPlugin] | None = None) -> Iterator[str]:
    """Yield the optimizer settings that a method gives a network, as words.

    Args:
        role: The network.
        optimizer: Where it is known: what it has no use for is left out.
    """
    honoured = ADAM_KEYS if optimizer is None else optimizer.honours
    if role.learning_rate is not None and not (optimizer is not None and optimizer.estimates_learning_rate):
        yield f"learning rate {role.learning_rate:g}"
    if role.betas is not None and "adam_beta1" in honoured:
        yield f"betas {role.betas[0]:g} and {role.betas[1]:g}"
    if role.weight_decay is not None and "adam_weight_decay" in honoured:
        yield f"weight decay {role.weight_decay:g}"
    if role.max_grad_norm is not None:
        yield f"gradients clipped at {role.max_grad_norm:g}" if role.max_grad_norm else "gradients not clipped"
