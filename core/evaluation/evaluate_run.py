"""Evaluation of a run: its configuration's prompts, steps and evaluators, at its end or long after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..engine.returned import sampler_of
from ..errors import UserError
from ..settings.configuration import default_resolution
from .evaluate import evaluate
from .evaluators import build_evaluators, evaluation_setting, scores_validations
from .plan import plan_evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from ..plugin_api.context import NetworksByRole
    from ..plugin_api.family import ModelFamily
    from ..plugin_api.method import Method
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from .result import Evaluation

logger = logging.getLogger(__name__)
MOST_REAL_IMAGES = 1000
REAL_BYTES = 2**30
RealImages = Callable[[int, int, int], "Tensor"]
"""(count, width, height) -> images (M, 3, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Subject:
    """The student that is scored, and its teacher.

    Attributes:
        family: Family of the run.
        method: Gives the student's sampler and the role that is scored.
        networks: Of the run, or :class:`..runs.finished.ExportedNetworks`.
        loras: LoRAs beside the student's with their weights, for the record.
        any_process: Returns True if a flag is set in any of the processes that run the networks together.
    """

    family: ModelFamily
    method: Method
    networks: NetworksByRole
    loras: Mapping[str, float] = field(default_factory=dict)
    any_process: Callable[[bool], bool] = bool


@dataclass(frozen=True)
class ComparisonData:
    """The data that students are scored on.

    Attributes:
        prompts: Captions of the data, or the validation prompts where there are none.
        real_images: The data pipeline's; without it there are no distances to the data.
    """

    prompts: Sequence[str]
    real_images: RealImages | None = None


@dataclass(frozen=True)
class EvaluationSize:
    """How much is evaluated; None for what the configuration says.

    Attributes:
        steps: Of the student.
        teacher_steps: Of the teacher.
        num_samples: Images per score.
        resolution: (width, height) in pixels.
    """

    steps: Sequence[int] | None = None
    teacher_steps: Sequence[int] | None = None
    num_samples: int | None = None
    resolution: tuple[int, int] | None = None


def evaluate_run(
    configuration: Configuration, registry: Registry, subject: Subject, data: ComparisonData, size: EvaluationSize
) -> Evaluation:
    """Score the run's student against its teacher.

    Args:
        configuration: Of the run.
        registry: Where evaluators come from.
        subject: The student and its teacher.
        data: Prompts, and real images to compare with.
        size: What is asked for in place of the configuration's.

    Raises:
        UserError: There is no prompt, or no sample is asked for.
    """
    family, method, prompts = subject.family, subject.method, data.prompts
    run = configuration.run
    count = run.evaluation_num_samples if size.num_samples is None else size.num_samples
    _require_something(prompts, count)
    width, height = size.resolution or default_resolution(configuration)
    plan = plan_evaluation(
        family,
        lambda number: sampler_of(
            method, family.schedule, num_inference_steps=number, guidance_scale=run.validation_guidance
        ),
        prompts=prompts[:count],
        num_samples=count,
        seed=run.seed,
        resolution=(width, height),
        steps=size.steps or _possible_steps(configuration, family, method),
        teacher_steps=size.teacher_steps or run.evaluation_teacher_steps,
        teacher_guidance=run.evaluation_teacher_guidance,
        role=method.result_role(),
    )
    real = images_of_data(data.real_images, width, height, count)
    setting = evaluation_setting(family, num_data=0 if real is None else len(real))
    evaluators, left_out = build_evaluators(registry, configuration, setting)
    found = evaluate(
        family, subject.networks, plan, evaluators, data=real, left_out=left_out, any_process=subject.any_process,
        first=run.validation_scores_num_samples if scores_validations(run) else 0,
    )  # fmt: skip
    found.loras = dict(subject.loras)
    return found


def images_of_data(real_images: RealImages | None, width: int, height: int, count: int) -> Tensor | None:
    """Return the real images to compare with, shape (M, 3, H, W); None, which is reported, where there are none."""
    data = real_images(num_real_images(width, height, count), width, height) if real_images else None
    if data is None or not len(data):
        logger.info("there are no real images to compare with: distances to the data are left out")
        return None
    return data


def _possible_steps(configuration: Configuration, family: ModelFamily, method: Method) -> list[int]:
    """Return ``evaluation_steps`` without those that the method cannot sample with, each of which is reported."""
    possible = []
    for steps in configuration.run.evaluation_steps:
        try:
            sampler_of(method, family.schedule, num_inference_steps=steps)
        except UserError as error:
            logger.info(f"evaluation_steps: {steps} is left out: {error.message}")
        else:
            possible.append(steps)
    if not possible:
        raise UserError("none of evaluation_steps can be sampled", "set evaluation_steps to smaller numbers")
    return possible


def _require_something(prompts: Sequence[str], count: int) -> None:
    if not prompts or count < 1:
        raise UserError(
            "there is nothing to evaluate: no prompts, or no samples", "set validation_prompt, --num-samples"
        )


def num_real_images(width: int, height: int, num_samples: int = 0) -> int:
    """Return how many real images distances are measured to: what a gigabyte holds, at most a thousand or the number of
    generated images.
    """
    return max(16, min(max(MOST_REAL_IMAGES, num_samples), REAL_BYTES // (3 * 4 * width * height)))
