"""Scores of the student at each validation, always on the same prompts and noise; the best, and whether it got worse.

They lie in ``validation/step-000350/scores.json``, beside the images of that validation.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ..plugin_api.evaluator import Samples
from ..utils.files import write_text
from ..utils.progress import working
from ..utils.seeds import generator_states, set_generator_states
from .evaluate import Scorers, directions, encode
from .evaluate_run import images_of_data
from .evaluators import build_evaluators, evaluation_setting
from .plan import SampleSet
from .result import format_score
from .sampling import make_images, plural, sampling

if TYPE_CHECKING:
    from ..engine.tracking import Trackers
    from ..plugin_api.batch import Conditioning
    from ..plugin_api.context import NetworksByRole
    from ..plugin_api.evaluator import Evaluator
    from ..plugin_api.family import ModelFamily
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from .evaluate_run import ComparisonData
    from .sampling import SamplingPlan

logger = logging.getLogger(__name__)
FILE = "scores.json"
NUM_PARTS = 4
"""Parts of the samples, each scored by itself too: how they differ tells what of a difference is chance."""
FEWEST_OF_PART = 4
CLEARLY = 3.0
"""Standard errors, over the parts, by which a validation is clearly worse than another."""
MUCH = 0.25
"""Share of the distance from the worst to the best validation that has to be lost."""


@dataclass(frozen=True)
class ValidationScores:
    """Scores of one validation.

    Attributes:
        step: Optimizer steps taken.
        samples: :meth:`.plan.SampleSet.identity` of the samples.
        sampling: Steps and guidance of the student.
        higher_is_better: For each score.
        scores: By name, the most telling first.
        parts: Each score of the parts of the samples, where parts can be scored.
        left_out: Scores and evaluators that there are none of, with the reason.
    """

    step: int
    samples: Mapping[str, Any]
    sampling: Mapping[str, float]
    higher_is_better: Mapping[str, bool]
    scores: Mapping[str, float]
    parts: Mapping[str, Sequence[float]]
    left_out: Mapping[str, str]

    @classmethod
    def read(cls, file: Path) -> ValidationScores:
        """Read ``scores.json``. Raises ValueError for a file that is damaged."""
        return TypeAdapter(cls).validate_json(file.read_bytes())

    def compares_with(self, other: ValidationScores) -> bool:
        """Return True if both were made of the same samples in the same way."""
        return (self.samples, self.sampling) == (other.samples, other.sampling)

    def describe(self) -> str:
        """Return the scores in one line."""
        named = (f"{name.replace('_', ' ')} {format_score(value)}" for name, value in self.scores.items())
        return f"scores at step {self.step:,}: {', '.join(named) or 'none'}"


class ValidationScorer:
    """Scores a run's student at its validations.

    Between validations it holds the prompts' embeddings and the real images, in bytes of the host; evaluators are made
    anew each time, so that their networks take no memory of the training.

    Args:
        configuration: Of the run.
        registry: Where evaluators come from.
        family: Encodes prompts and runs the pipeline.
        student: The student's sampling plan at validation.
        data: Prompts, and real images to compare with.
        resolution: (width, height) in pixels.
        writes: False in processes that only help to make the images, since each holds a part of the weights.
    """

    def __init__(
        self,
        configuration: Configuration,
        registry: Registry,
        family: ModelFamily,
        *,
        student: SamplingPlan,
        data: ComparisonData,
        resolution: tuple[int, int],
        writes: bool = True,
    ) -> None:
        count = configuration.run.validation_scores_num_samples
        self._configuration, self._registry, self._family = configuration, registry, family
        self._student, self._real_images, self._writes = student, data.real_images, writes
        self.samples = SampleSet(tuple(data.prompts[:count]), count, configuration.run.seed, *resolution)
        self._embeds: Conditioning | None = None
        self._data: Tensor | None = None
        self._failed: dict[str, str] = {}
        self._said: set[str] = set()
        self._warned: set[int] = set()

    def prepare(self) -> None:
        """Encode the prompts, which stay in memory; call before the encoders are released."""
        self._embeds = encode(self._family, self.samples.prompts)

    def run(self, step: int, networks: NetworksByRole, trackers: Trackers, *, folder: Path) -> None:
        """Score the student of `step`, write ``scores.json``, and tell trackers ``validation/NAME`` of each score.

        A run that is clearly worse than it was is warned of, once for each best validation.

        Args:
            step: Optimizer steps taken.
            networks: Of the student.
            trackers: Get the scores.
            folder: Of the validation.
        """
        states = generator_states()  # an evaluator may draw from them
        try:
            images = self._images(networks)
            if not self._writes:
                return
            with working("scoring these images"):
                found = self._score(step, images)
        finally:
            set_generator_states(states)
        write_text(folder / FILE, json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
        trackers.log({f"{folder.parent.name}/{name}": value for name, value in found.scores.items()}, step)
        self._tell(found)
        with suppress(ValueError):  # a damaged file of an earlier step ends no run: the report says it
            course = Course.of(map(ValidationScores.read, score_files(folder.parent.parent)), last_step=step)
            worse, best = (course.worse(), course.best()) if course else (None, None)
            if worse and best and best.step not in self._warned:
                self._warned.add(best.step)
                logger.warning(worse)

    def _images(self, networks: NetworksByRole) -> Tensor:
        """Make the student's images, (N, 3, H, W)."""
        if self._embeds is None:
            self.prepare()
        assert self._embeds is not None
        samples, student = self.samples, self._student
        counts = plural(samples.num_samples, "image"), plural(student.steps, "step")
        what = "making {} of the student to score, {}".format(*counts)
        with working(what), sampling(networks, student.role) as network:
            batches = make_images(
                self._family, network, student, self._embeds, samples.prompt_indices, samples.seeds,
                width=samples.width, height=samples.height,
            )  # fmt: skip
            return torch.cat(list(batches))

    def _score(self, step: int, images: Tensor) -> ValidationScores:
        data, samples = self._real(), self.samples
        num_data = 0 if data is None else len(data)
        setting = evaluation_setting(self._family, num_data=num_data)
        evaluators, left_out = build_evaluators(self._registry, self._configuration, setting)
        usable = {name: each for name, each in self._ranked(evaluators).items() if name not in self._failed}
        scorers, whole = Scorers(usable, left_out | self._failed), Samples(images, samples.sample_prompts, None, data)
        given = scorers.score(whole)
        scores = {name: value for name, value in given.items() if math.isfinite(value)}
        left_out = scorers.left_out | scorers.unscored(whole, given)
        left_out |= {name: f"it is {value}" for name, value in given.items() if name not in scores}
        self._failed |= {name: reason for name, reason in scorers.left_out.items() if name in usable}
        return ValidationScores(
            step, samples.identity(num_data=num_data),
            {"steps": self._student.steps, "guidance": self._student.guidance},
            {name: up for name, up in directions(usable).items() if name in scores}, scores,
            _of_parts(scorers, whole, list(scores)), left_out,
        )  # fmt: skip

    def _ranked(self, evaluators: Mapping[str, Evaluator]) -> dict[str, Evaluator]:
        """Return those that somebody asked for first, since the first score tells which validation is the best."""
        if self._configuration.run.evaluators:
            return dict(evaluators)
        return dict(sorted(evaluators.items(), key=lambda item: item[1].by_default))

    def _real(self) -> Tensor | None:
        """Return the real images, (M, 3, H, W) in [0, 1], which are read once."""
        if self._data is None:
            samples = self.samples
            found = images_of_data(self._real_images, samples.width, samples.height, samples.num_samples)
            self._data = torch.zeros(0, dtype=torch.uint8) if found is None else (found * 255).round().byte()
        return self._data.float() / 255 if len(self._data) else None

    def _tell(self, found: ValidationScores) -> None:
        """Log the scores, and what is left out that was not said before."""
        logger.info(found.describe())
        new = [f"{name} ({reason})" for name, reason in found.left_out.items() if name not in self._said]
        if new:
            logger.info(f"validation_scores leaves out: {'; '.join(new)}")
        self._said |= set(found.left_out)


def _of_parts(scorers: Scorers, samples: Samples, names: Sequence[str]) -> dict[str, list[float]]:
    """Return the scores of parts of the samples, always the same parts; of those scores that each of them has."""
    if len(samples.images) < NUM_PARTS * FEWEST_OF_PART:
        return {}
    every = [slice(first, None, NUM_PARTS) for first in range(NUM_PARTS)]
    parts = [scorers.score(Samples(samples.images[of], samples.prompts[of], None, samples.data)) for of in every]
    whole = [name for name in names if all(math.isfinite(part.get(name, math.nan)) for part in parts)]
    return {name: [part[name] for part in parts] for name in whole}


def score_files(output_dir: Path) -> list[Path]:
    """Return the files of scores in the folder of a run, in the order of their steps."""
    return sorted((output_dir / "validation").glob(f"step-*/{FILE}"))


@dataclass(frozen=True)
class Course:
    """Validations that compare with each other, the oldest first.

    Attributes:
        validations: At least one; all of the newest one's samples and sampling.
        num_others: Those that do not compare with the newest.
    """

    validations: Sequence[ValidationScores]
    num_others: int = 0

    @classmethod
    def of(cls, found: Iterable[ValidationScores], *, last_step: int) -> Course | None:
        """Return those of `found` that compare with the newest; None where there is none.

        Args:
            found: The oldest first.
            last_step: Those beyond are of a time before the run was resumed from an earlier step.
        """
        scored = [each for each in found if each.scores and each.step <= last_step]
        alike = [each for each in scored if each.compares_with(scored[-1])]
        return cls(alike, len(scored) - len(alike)) if alike else None

    @property
    def samples(self) -> Mapping[str, Any]:
        """The identity of the samples that they were scored on."""
        return self.validations[-1].samples

    @property
    def names(self) -> list[str]:
        """The scores of the newest validation."""
        return list(self.validations[-1].scores)

    @property
    def ranked_by(self) -> str | None:
        """The score that tells which validation is the best: the first that has a direction and each of them has."""
        better = self.validations[-1].higher_is_better
        whole = [name for name in self.names if all(name in each.scores for each in self.validations)]
        return next((name for name in whole if better.get(name) is not None), None)

    def best(self, name: str | None = None) -> ValidationScores | None:
        """Return the best validation by a score, the earliest of equal ones; by :attr:`ranked_by` unless one is named.

        None where the score has no direction.
        """
        name = name or self.ranked_by
        if name is None or self.validations[-1].higher_is_better.get(name) is None:
            return None
        having = [each for each in self.validations if name in each.scores]
        return max(having, key=lambda each: self._signed(name, each.scores[name]))

    def worse(self) -> str | None:
        """Return what is said where the last validation is clearly worse than the best; None where it is not.

        It is where it has lost a quarter of what lies between the worst and the best validation, and where the parts of
        the samples agree: on average they lost three times their standard error.
        """
        name, best, last = self.ranked_by, self.best(), self.validations[-1]
        if name is None or best is None or best is last:
            return None
        values = [self._signed(name, each.scores[name]) for each in self.validations]
        lost = max(values) - self._signed(name, last.scores[name])
        parts = zip(best.parts.get(name, ()), last.parts.get(name, ()), strict=False)
        losses = [self._signed(name, before) - self._signed(name, now) for before, now in parts]
        if len(losses) < 2 or lost < MUCH * (max(values) - min(values)):
            return None
        if fmean(losses) <= CLEARLY * stdev(losses) / len(losses) ** 0.5:
            return None
        said = name.replace("_", " ")
        return (
            f"the run got worse after step {best.step:,}: {said} was {format_score(best.scores[name])} there and is "
            f"{format_score(last.scores[name])} at step {last.step:,}"
        )

    def _signed(self, name: str, value: float) -> float:
        return value if self.validations[-1].higher_is_better[name] else -value
