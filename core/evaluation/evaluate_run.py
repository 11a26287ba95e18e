"""Evaluation of a run: its configuration's prompts, steps and evaluators, at its end or long after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..settings.configuration import default_resolution
from .evaluate import evaluate
from .evaluators import build_evaluators, evaluation_setting
from .plan import plan_evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from ..plugin_api.context import NetworksByRole
    from ..plugin_api.family import ModelFamily
    from ..plugin_api.method import Method
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from .result import Evaluation

Say = Callable[[str], None]
MOST_REAL_IMAGES = 1000
REAL_BYTES = 2**30
RealImages = Callable[[int, int, int], "Tensor"]
"""(count, width, height) -> images (M, 3, H, W) in [0, 1]."""


def evaluate_run(
    configuration: Configuration,
    registry: Registry,
    family: ModelFamily,
    method: Method,
    networks: NetworksByRole,
    *,
    prompts: Sequence[str],
    real_images: RealImages | None = None,
    steps: Sequence[int] | None = None,
    teacher_steps: Sequence[int] | None = None,
    num_samples: int | None = None,
    resolution: tuple[int, int] | None = None,
    loras: Mapping[str, float] | None = None,
    say: Say = lambda line: None,
) -> Evaluation:
    """Score the run's student against its teacher.

    Args:
        configuration: Gives whatever of the following is None.
        registry: Gives the evaluators.
        family: Family of the run.
        method: Gives the student's sampler and the role that is scored.
        networks: Of the run, or :class:`.assemble.ExportedNetworks`.
        prompts: Captions of the data, or the validation prompts where there are none.
        real_images: The data pipeline's; without it there are no distances to the data.
        steps: Numbers of steps of the student.
        teacher_steps: Numbers of steps of the teacher.
        num_samples: Images per score.
        resolution: (width, height) in pixels.
        loras: What stands beside the student's, for the record.
        say: Where progress goes.

    Raises:
        UserError: There is no prompt, or no sample is asked for.
    """
    run = configuration.run
    count = run.evaluation_num_samples if num_samples is None else num_samples
    _require_something(prompts, count)
    width, height = resolution or default_resolution(configuration)
    plan = plan_evaluation(
        family,
        lambda number: method.sampler(
            family.schedule, num_inference_steps=number, guidance_scale=run.validation_guidance
        ),
        prompts=prompts[:count],
        num_samples=count,
        seed=run.seed,
        resolution=(width, height),
        steps=steps or _possible_steps(configuration, family, method, say),
        teacher_steps=teacher_steps or run.evaluation_teacher_steps,
        teacher_guidance=run.evaluation_teacher_guidance,
        role=method.result_role(),
    )
    data = _real(real_images, width, height, count, say)
    setting = evaluation_setting(family, num_data=0 if data is None else len(data))
    evaluators, left_out = build_evaluators(registry, configuration, setting)
    found = evaluate(family, networks, plan, evaluators, data=data, say=say, left_out=left_out)
    found.loras = dict(loras or {})
    return found


def _real(real_images: RealImages | None, width: int, height: int, count: int, say: Say) -> Tensor | None:
    """Return the real images to compare with, shape (M, 3, H, W); None, which is reported, where there are none."""
    data = real_images(num_real_images(width, height, count), width, height) if real_images else None
    if data is None or not len(data):
        say("there are no real images to compare with: distances to the data are left out")
        return None
    return data


def _possible_steps(configuration: Configuration, family: ModelFamily, method: Method, say: Say) -> list[int]:
    """Return ``evaluation_steps`` without those that the method cannot sample with, each of which is reported."""
    possible = []
    for steps in configuration.run.evaluation_steps:
        try:
            method.sampler(family.schedule, num_inference_steps=steps)
        except UserError as error:
            say(f"evaluation_steps: {steps} is left out: {error.message}")
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
