"""The choice of the evaluators that score a run, without those that cannot be used here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..plugin_api.evaluator import EvaluationSetting, Evaluator
from ..plugin_api.family import ModelFamily
from ..utils.packages import missing_packages

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..settings.run_settings import RunSettings


def build_evaluators(
    registry: Registry, configuration: Configuration, setting: EvaluationSetting
) -> tuple[dict[str, Evaluator], dict[str, str]]:
    """Build the run's evaluators; return them, and the reasons for those that cannot be used here."""
    usable: dict[str, Evaluator] = {}
    left_out: dict[str, str] = {}
    for name, config in configuration.evaluators.items():
        evaluator = registry.get("evaluator", name)
        reason = _unusable(evaluator, setting, config)
        if reason:
            left_out[name] = reason
        else:
            usable[name] = evaluator(config, setting)
    return usable, left_out


def require_evaluators(registry: Registry, configuration: Configuration) -> None:
    """Raise UserError where one of the run's evaluators cannot be used."""
    setting, reasons = early_evaluation_setting(configuration), []
    for name, config in configuration.evaluators.items():
        reason = _unusable(registry.get("evaluator", name), setting, config)
        reasons += [f"{name}: {reason}"] if reason else []
    if reasons:
        raise UserError("; ".join(reasons), "settings are given as --set evaluator_config.NAME.KEY=VALUE")


def evaluation_notices(registry: Registry, configuration: Configuration) -> list[str]:
    """Return notices about evaluators that the run asks for, by name or by settings, and that cannot be used."""
    run, setting, lines = configuration.run, early_evaluation_setting(configuration), []
    scores = bool(run.evaluation_num_samples) or scores_validations(run)
    for name, config in configuration.evaluators.items() if scores else ():
        evaluator = registry.get("evaluator", name)
        reason = _unusable(evaluator, setting, config)
        if reason and (run.evaluators or not evaluator.by_default):
            lines.append(f"evaluator {name} cannot be used, so its scores will be missing: {reason}")
    return lines


def scores_validations(run: RunSettings) -> bool:
    """Return True if the run scores its student at each validation."""
    return run.validation_scores and run.validation_step_interval > 0


def _unusable(evaluator: type[Evaluator], setting: EvaluationSetting, config: Any) -> str | None:
    return missing_packages(evaluator.packages) or evaluator.usable(setting, config)


def evaluation_setting(family: ModelFamily, *, num_data: int | None = None) -> EvaluationSetting:
    """Describe what evaluators may use: the model's folder, the device, `num_data` real images where that is known."""
    folder = Path(family.settings.source)
    source = folder if folder.is_dir() else None
    return EvaluationSetting(model_path=source, device=family.settings.device, num_data=num_data)


def early_evaluation_setting(configuration: Configuration) -> EvaluationSetting:
    """Return the same before there is a family, when the number of real images is not known."""
    run = configuration.run
    folder = Path(run.pretrained_model_name_or_path or "")
    known = run.pretrained_model_name_or_path is not None and folder.is_dir()
    return EvaluationSetting(model_path=folder if known else None)
