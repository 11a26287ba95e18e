"""Comparison of a method's requirements with a family's capabilities, before weights load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import Finding, UserError
from ..settings.run_settings import RunSettings

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from ..plugin_api.method import Method, MethodSetup, ModelType, Requirements, Role
    from ..settings.dataset_settings import DatasetSettings

SWITCHES = {
    "guidance_embedding": "a network that takes the guidance scale as an input",
    "second_time": "a network that takes a second time",
    "features": "features from inside the network",
    "pixels": "images that are decoded with a gradient",
}
"""Name of a requirement, and of the capability that meets it -> its description, for messages."""


def check_requirements(
    method: type[Method],
    method_config: Any,
    family: type[ModelFamily],
    run: RunSettings,
    *,
    files: Mapping[str, str] | None = None,
    num_timesteps: int = 1000,
) -> tuple[list[Finding], list[str]]:
    """Return findings and notices about a method with this configuration on this family.

    Args:
        method: The chosen method.
        method_config: Its validated configuration.
        family: The chosen family.
        run: The run's settings.
        files: Key -> the file its value comes from, for the findings; "" for keys that nobody gave.
        num_timesteps: Training timesteps of the model's discrete schedule, where it is known already.
    """
    from ..engine.returned import roles_of
    from ..plugin_api.method import MethodSetup

    files = files or {}
    setup = MethodSetup(run.model_type, use_ema=run.use_ema)
    findings: list[Finding] = []
    file = files.get("distillation_config", files.get("distillation_method", files.get("", "configuration")))
    refusal = _own_refusal(method, method_config, setup, run)
    if refusal is not None:
        return [Finding(file, "distillation_method", method.name, refusal.message, refusal.remedy)], []
    needs, able = method.requires(method_config, setup), family.capabilities

    def refuse(key: str, problem: str, remedy: str) -> None:
        file = files.get(key, files.get("", "configuration"))
        findings.append(Finding(file, key, getattr(run, key), problem, remedy))

    for problem in _untrainable(method, roles_of(method, method_config, setup), family, model_type=run.model_type):
        refuse(*problem)
    for switch, meaning in SWITCHES.items():
        if getattr(needs, switch) and not getattr(able, switch):
            problem = f"the method {method.name!r} (model_type {run.model_type}) needs {meaning} ({switch})"
            remedy = _without(switch, method, method_config, run)
            refuse("model_family", f"{problem}, which the family {family.name!r} lacks", remedy)
    if needs.zero_dropout and run.model_type == "lora" and run.lora_dropout > 0:
        problem = f"the method {method.name!r} compares two passes of one network, which dropout makes differ"
        refuse("lora_dropout", f"{problem}; must be 0", "set lora_dropout to 0")
    notices = _without_effect(method, needs, run)
    for path, owner, config in with_parts(method, method_config, f"distillation_config.{method.name}"):
        points = owner.requires(config, setup).divides_timesteps
        if points is None or num_timesteps % points == 0:
            continue
        keys = [name for name in type(config).model_fields if getattr(config, name) == points]
        key = ".".join([path, *keys[:1]])
        if points > num_timesteps:
            problem = f"is more than the {num_timesteps} training timesteps of the model"
            findings.append(Finding(file, key, points, problem, f"lower it to a divisor of {num_timesteps}"))
        else:
            notices.append(_short_grid(key, points, num_timesteps))
    return findings, notices


def _without_effect(method: type[Method], needs: Requirements, run: RunSettings) -> list[str]:
    """Return notices about keys that this method makes no use of."""
    if run.pixel_decoder is None or needs.pixels:
        return []
    return [f"pixel_decoder has no effect: the method {method.name!r} decodes nothing in training"]


def _untrainable(
    method: type[Method], roles: Iterable[Role], family: type[ModelFamily], *, model_type: ModelType
) -> Iterator[tuple[str, str, str]]:
    """Yield (key, problem, remedy) of each network that the family cannot train in the way asked for."""
    able = family.capabilities
    if not getattr(able, model_type):
        other = "full" if model_type == "lora" else "lora"
        yield "model_type", f"the family {family.name!r} cannot be trained this way", f"set model_type to {other}"
    for role in roles:
        if role.trains in ("lora", "full") and role.trains != model_type and not getattr(able, role.trains):
            problem = f"the method {method.name!r} trains {role.name} as {role.trains!r}, which the family"
            remedy = f"choose another family, or leave out what makes {role.name} differ from model_type"
            yield "model_family", f"{problem} {family.name!r} cannot", remedy


def check_smaller_student(
    family: type[ModelFamily], family_config: Any, run: RunSettings, *, files: Mapping[str, str]
) -> list[Finding]:
    """Return findings about settings that make the student smaller than its teacher, where it is a LoRA on the teacher
    itself.
    """
    if run.model_type == "full":
        return []
    file = files.get("family_config", files.get("", "configuration"))
    return [
        Finding(
            file,
            f"family_config.{key}",
            getattr(family_config, key),
            "makes the student smaller than its teacher, which a LoRA on the teacher's own weights cannot be",
            "set model_type to full, or leave the key out",
        )
        for key in family.smaller_keys(family_config)
    ]


def _without(switch: str, method: type[Method], config: Any, run: RunSettings) -> str:
    """Return the remedy for a family that lacks `switch`."""
    from ..diffusion.guidance import GuidanceRange

    ways = ["choose another family or method"]
    if run.model_type == "full":
        ways.append("model_type lora")
    if switch == "guidance_embedding" and isinstance(config, GuidanceRange):
        ways.append(f"one guidance scale (distillation_config.{method.name}: w_min equal to w_max)")
    return ", or ".join(ways)


def _own_refusal(method: type[Method], config: Any, setup: MethodSetup, run: RunSettings) -> UserError | None:
    """Return the method's own error about these settings or this kind of training, or None."""
    from ..engine.returned import roles_of

    try:
        method.requires(config, setup)
        roles_of(method, config, setup)
        if run.max_train_steps:
            method.stages(config, total_steps=run.max_train_steps)
    except UserError as error:
        return error
    return None


def with_parts(method: type[Method], config: Any, path: str) -> Iterator[tuple[str, type[Method], Any]]:
    """Yield a method and those that its settings are made of, as path of the settings, class, settings."""
    from ..plugin_api.method import method_parts

    yield path, method, config
    for inner, part in method_parts(config):
        yield from with_parts(part.found, part.settings, f"{path}.{inner}.config")


def check_images(
    method: type[Method],
    method_config: Any,
    run: RunSettings,
    datasets: Sequence[DatasetSettings],
    *,
    files: Mapping[str, str],
) -> list[Finding]:
    """Return findings about datasets that have captions alone, where the method needs images.

    Args:
        method: The chosen method.
        method_config: Its validated configuration.
        run: The run's settings.
        datasets: Those that are trained on.
        files: Id of a dataset -> the file that its type comes from.
    """
    from ..plugin_api.method import MethodSetup

    prompts = [entry for entry in datasets if not entry.has_images]
    setup = MethodSetup(model_type=run.model_type, use_ema=run.use_ema)
    if not prompts or not method.requires(method_config, setup).images:
        return []
    alone = len(prompts) == len(datasets)
    problem = f"the method {method.name!r} needs images, and this dataset has captions alone"
    problem += "; no other has any" if alone else ""
    remedy = "name a folder of images with captions (dataset_type image)" if alone else "leave the entry out"
    return [
        Finding(
            files[entry.id],
            f"data.{entry.id}.dataset_type",
            entry.dataset_type,
            problem,
            f"{remedy}, or choose a method that needs none (distillation_method)",
        )
        for entry in prompts
    ]


def idle_micro_conditioning(family: type[ModelFamily], datasets: Sequence[DatasetSettings]) -> list[str]:
    """Return notices about datasets whose ``micro_conditioning`` the family's network has no input for."""
    if family.capabilities.micro_conditioning:
        return []
    return [
        f"data.{entry.id}.micro_conditioning = {entry.micro_conditioning} has no effect: the network of "
        f"{family.name!r} is not told the sizes of images"
        for entry in datasets
        if entry.micro_conditioning != "actual"
    ]


def trajectory_points(method: type[Method], method_config: Any, run: RunSettings) -> int:
    """Return the number of points of the teacher's trajectory that the method needs with this configuration; 0 for
    none.
    """
    from ..plugin_api.method import MethodSetup

    return method.requires(method_config, MethodSetup(run.model_type, use_ema=run.use_ema)).trajectory_points


def _short_grid(key: str, points: int, num_timesteps: int) -> str:
    divisors = [number for number in range(1, num_timesteps + 1) if num_timesteps % number == 0]
    near = sorted(sorted(divisors, key=lambda divisor: abs(divisor - points))[:2])
    return (
        f"{key} = {points} does not divide the {num_timesteps} training timesteps: the grid ends at timestep "
        f"{points * (num_timesteps // points) - 1}; {near[0]} or {near[1]} would reach {num_timesteps - 1}"
    )
