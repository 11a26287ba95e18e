"""Evaluation of teacher against student, in scores, seconds and one image."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..drawing.grid import to_images
from ..errors import described, is_failure
from ..plugin_api.evaluator import Evaluator, Samples
from .plan import EvaluationPlan
from .prompts import encoded
from .result import Row
from .sampling import SamplingPlan, batch_size, make_images, plural, sampling

if TYPE_CHECKING:
    from torch import nn

    from ..plugin_api.batch import Conditioning
    from ..plugin_api.context import NetworksByRole
    from ..plugin_api.family import ModelFamily
    from .result import Evaluation, ValidationReference

logger = logging.getLogger(__name__)
T = TypeVar("T")
SHOWN = 8
"""Images of each sampling plan that go into ``evaluation.png``."""
LATENCY_SECONDS = 2.0
"""Time for which the latency of a single image is measured repeatedly, at most three times."""


def evaluate(
    family: ModelFamily,
    networks: NetworksByRole,
    plan: EvaluationPlan,
    evaluators: Mapping[str, Evaluator],
    *,
    data: Tensor | None = None,
    left_out: Mapping[str, str] | None = None,
    any_process: Callable[[bool], bool] = bool,
    first: int = 0,
) -> Evaluation:
    """Make every sampling plan's images from the same noise and score them.

    The full teacher comes first: its images are the reference of the others.

    Args:
        family: Encodes the prompts and runs the pipeline.
        networks: Gives the networks of the roles in the plan.
        plan: The images to make.
        evaluators: By name; see :func:`.evaluators.build_evaluators`.
        data: Real images (M, 3, H, W) in [0, 1] at the plan's size, or None.
        left_out: Evaluators that cannot be used here, with the reason.
        any_process: Returns True if a flag is set in any of the processes that run the networks together.
        first: Samples, the first, that the full teacher is scored on too, as validation has the student; 0 for none.
    """
    from .result import Evaluation

    scorers = Scorers(evaluators, dict(left_out or {}))
    counts = plural(len(plan.sampling_plans), "way"), plural(plan.num_samples, "image")
    logger.info("scoring {} of sampling, {} each".format(*counts))
    embeds = encode(family, plan.prompts)
    rows, reference, validation_reference = dict[int, Row](), None, None
    others = [sampling_plan for sampling_plan in plan.sampling_plans if sampling_plan is not plan.reference]
    # role by role, since changing the network can mean loading it
    others.sort(key=lambda sampling_plan: sampling_plan.role != plan.reference.role)
    for role, sampling_plans in _by_role([plan.reference, *others]):
        with sampling(networks, role) as network:
            _warm_up(family, network, sampling_plans[0], embeds, plan)
            for sampling_plan in sampling_plans:
                made = _made_if_possible(family, network, sampling_plan, embeds, plan, any_process=any_process)
                if made is None:
                    continue
                images, row = made
                samples = Samples(images, plan.sample_prompts, reference, data)  # None for the full teacher, the first
                row.scores = scorers.score(samples)
                if sampling_plan is plan.reference:
                    reference, validation_reference = images, _of_first(scorers, plan, samples, first)
                rows[id(sampling_plan)] = row
                done = f"{sampling_plan.name} at {plural(sampling_plan.steps, 'step')}"
                logger.info(f"evaluated {done}: {row.seconds_per_image:.3g} s per image")
    return Evaluation(
        plan=plan,
        rows=[rows[id(sampling_plan)] for sampling_plan in plan.sampling_plans if id(sampling_plan) in rows],
        higher_is_better=directions(evaluators),
        left_out=scorers.left_out,
        num_data=0 if data is None else len(data),
        device=str(family.settings.device),
        validation_reference=validation_reference,
    )


def _of_first(scorers: Scorers, plan: EvaluationPlan, samples: Samples, first: int) -> ValidationReference | None:
    """Score the first of the full teacher's samples by themselves; None where there are not so many."""
    from .result import ValidationReference

    if not 0 < first <= plan.num_samples:
        return None
    alone, num_data = plan.first(first), 0 if samples.data is None else len(samples.data)
    scores = scorers.score(Samples(samples.images[:first], alone.sample_prompts, None, samples.data))
    return ValidationReference(plan.reference.steps, alone.identity(num_data=num_data), scores)


def directions(evaluators: Mapping[str, Evaluator]) -> dict[str, bool]:
    """Return whether more is better, for each score of the evaluators."""
    return {name: up for evaluator in evaluators.values() for name, up in evaluator.higher_is_better.items()}


class Scorers:
    """The evaluators that have not failed.

    Args:
        evaluators: By name.
        left_out: Those that cannot be used, with the reason; ones that fail are added.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator], left_out: dict[str, str]) -> None:
        self._evaluators, self.left_out = dict(evaluators), left_out

    def score(self, samples: Samples) -> dict[str, float]:
        """Return the scores of all evaluators that have not failed yet."""
        scores: dict[str, float] = {}
        for name, evaluator in list(self._evaluators.items()):
            scores |= self._of(name, evaluator.score, samples) or {}
        return scores

    def _of(self, name: str, call: Callable[[Samples], dict[str, T]], samples: Samples) -> dict[str, T] | None:
        """Return what an evaluator says of the samples; None if it fails, which leaves it out."""
        try:
            return call(samples)
        except BaseException as error:  # one plugin's failure must not cost the other scores, nor a finished run
            if not is_failure(error):
                raise
            del self._evaluators[name]
            self.left_out[name] = f"it failed: {described(error)}"
            logger.warning(f"evaluator {name} failed and is left out: {described(error)}")
            return None

    def unscored(self, samples: Samples, scores: Mapping[str, float]) -> dict[str, str]:
        """Return what the evaluators declare and have not given for these samples, with the reason."""
        missing: dict[str, str] = {}
        for name, evaluator in list(self._evaluators.items()):
            reasons = self._of(name, evaluator.unscored, samples) or {}
            left = [score for score in evaluator.higher_is_better if score not in scores]
            missing |= {score: reasons.get(score, f"{name} has not given it for these images") for score in left}
        return missing


def _by_role(sampling_plans: Sequence[SamplingPlan]) -> Iterator[tuple[str, list[SamplingPlan]]]:
    for role in dict.fromkeys(sampling_plan.role for sampling_plan in sampling_plans):
        yield role, [sampling_plan for sampling_plan in sampling_plans if sampling_plan.role == role]


def encode(family: ModelFamily, prompts: Sequence[str], *, size: int = 64) -> Conditioning:
    """Encode all prompts in batches, with the prompts in front."""
    parts = [encoded(family, prompts[start : start + size]) for start in range(0, len(prompts), size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _made_if_possible(
    family: ModelFamily,
    network: nn.Module,
    sampling_plan: SamplingPlan,
    embeds: Conditioning,
    plan: EvaluationPlan,
    *,
    any_process: Callable[[bool], bool],
) -> tuple[Tensor, Row] | None:
    """Return what :func:`_make` does; None, which is logged, where the pipeline takes no such optional sampler."""
    try:
        return _make(family, network, sampling_plan, embeds, plan, any_process=any_process)
    except ValueError as error:
        if not sampling_plan.optional:
            raise
        # some pipelines give a scheduler times of their own, which not every scheduler takes
        logger.info(f"{sampling_plan.name} is left out: {family.name} does not take its scheduler: {error}")
        return None


def _make(
    family: ModelFamily,
    network: nn.Module,
    sampling_plan: SamplingPlan,
    embeds: Conditioning,
    plan: EvaluationPlan,
    *,
    any_process: Callable[[bool], bool],
) -> tuple[Tensor, Row]:
    def make(indices: Sequence[int], seeds: Sequence[int]) -> list[Tensor]:
        size = plan.width, plan.height
        return list(make_images(family, network, sampling_plan, embeds, indices, seeds, width=size[0], height=size[1]))

    start = time.perf_counter()
    images = torch.cat(make(plan.prompt_indices, plan.seeds))
    seconds = (time.perf_counter() - start) / plan.num_samples
    single = []
    # clocks differ: a process that makes one image more than the others waits for them, or spoils what they exchange
    while any_process(len(single) < 3 and sum(single) < LATENCY_SECONDS):
        begin = time.perf_counter()
        make([0], [plan.seed])
        single.append(time.perf_counter() - begin)
    row = Row(sampling_plan, seconds_per_image=seconds, seconds_single=median(single), images=to_images(images[:SHOWN]))
    return images, row


def _warm_up(
    family: ModelFamily, network: nn.Module, sampling_plan: SamplingPlan, embeds: Conditioning, plan: EvaluationPlan
) -> None:
    """Make one step at each batch size that is timed: first calls load, tune and allocate."""
    from dataclasses import replace

    # its own scheduler, which may tell the network more than the time; but not the times of another number of steps
    sampler = sampling_plan.sampler and replace(sampling_plan.sampler, call={})
    once = replace(sampling_plan, sampler=sampler, steps=1)
    for count in (min(batch_size(plan.width, plan.height), plan.num_samples), 1):
        indices, seeds = plan.prompt_indices[:count], plan.seeds[:count]
        list(make_images(family, network, once, embeds, indices, seeds, width=plan.width, height=plan.height))
