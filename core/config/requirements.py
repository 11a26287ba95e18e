"""What a method needs against what a family can do, compared before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..errors import Finding
from .run_settings import RunSettings

if TYPE_CHECKING:
    from ..family import ModelFamily
    from ..method import Method

SWITCHES = {
    "guidance_embedding": "a network that takes the guidance scale as an input",
    "second_time": "a network that takes a second time",
    "features": "features from inside the network",
}
"""Requirement and capability of one name -> what it is, for messages."""


def check_requirements(
    method: type[Method],
    method_config: Any,
    family: type[ModelFamily],
    run: RunSettings,
    *,
    files: Mapping[str, str] | None = None,
    prediction_type: str = "epsilon",
    num_timesteps: int = 1000,
) -> tuple[list[Finding], list[str]]:
    """Findings and notices of a method with this configuration on this family.

    Args:
        method: The chosen method.
        method_config: Its validated configuration.
        family: The chosen family.
        run: The run's settings.
        files: Key -> the file its value comes from, for the findings; "" for keys that nobody gave.
        prediction_type: Of the model, where it is known already.
        num_timesteps: Training timesteps of the model's discrete schedule, where it is known already.
    """
    from ..method import MethodSetup

    files = files or {}
    setup = MethodSetup(model_type=run.model_type, prediction_type=prediction_type, use_ema=run.use_ema)
    needs, able = method.requires(method_config, setup), family.capabilities
    findings: list[Finding] = []

    def refuse(key: str, problem: str, remedy: str) -> None:
        file = files.get(key, files.get("", "configuration"))
        findings.append(Finding(file, key, getattr(run, key), problem, remedy))

    if not getattr(able, run.model_type):
        other: Literal["lora", "full"] = "full" if run.model_type == "lora" else "lora"
        refuse("model_type", f"the family {family.name!r} cannot be trained this way", f"set model_type to {other}")
    for switch, meaning in SWITCHES.items():
        if getattr(needs, switch) and not getattr(able, switch):
            problem = f"the method {method.name!r} (model_type {run.model_type}) needs {meaning} ({switch})"
            remedy = "choose another family or method" + ("" if run.model_type == "lora" else ", or model_type lora")
            refuse("model_family", f"{problem}, which the family {family.name!r} lacks", remedy)
    if needs.zero_dropout and run.model_type == "lora" and run.lora_dropout > 0:
        problem = f"the method {method.name!r} compares two passes of one network, which dropout makes differ"
        refuse("lora_dropout", f"{problem}; must be 0", "set lora_dropout to 0")
    points = needs.divides_timesteps
    if points is None or num_timesteps % points == 0:
        return findings, []
    keys = [name for name in type(method_config).model_fields if getattr(method_config, name) == points]
    key = ".".join(["distillation_config", method.name, *keys[:1]])
    if points > num_timesteps:
        problem = f"is more than the {num_timesteps} training timesteps of the model"
        file = files.get("distillation_config", files.get("", "configuration"))
        findings.append(Finding(file, key, points, problem, f"lower it to a divisor of {num_timesteps}"))
        return findings, []
    return findings, [_short_grid(key, points, num_timesteps)]


def _short_grid(key: str, points: int, num_timesteps: int) -> str:
    divisors = [number for number in range(1, num_timesteps + 1) if num_timesteps % number == 0]
    near = sorted(sorted(divisors, key=lambda divisor: abs(divisor - points))[:2])
    return (
        f"{key} = {points} does not divide the {num_timesteps} training timesteps: the grid ends at timestep "
        f"{points * (num_timesteps // points) - 1}; {near[0]} or {near[1]} would reach {num_timesteps - 1}"
    )
