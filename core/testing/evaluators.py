"""Checks of an evaluator: the scores that it declares, finite, and the same for the same images."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..plugin_api.evaluator import EvaluationSetting, Samples
from .checks import NotApplicable, Subject, expect, failing
from .suite import Named

SIZE = 64
PROMPTS = ("a red fox", "two boats", "the moon, größer")


def checks(subject: Subject) -> list[Named]:
    """Return checks on smooth random images of 32 pixels."""
    return [
        ("it says whether it is usable", partial(_usable, subject)),
        ("its scores are finite and declared", partial(_scores, subject)),
        ("the same images get the same scores", partial(_same, subject)),
        ("it scores the teacher, and without data", partial(_bare, subject)),
        ("images are left as they are", partial(_untouched, subject)),
    ]


def _usable(subject: Subject) -> None:
    for setting in (
        EvaluationSetting(None),
        EvaluationSetting(None, num_data=SIZE),
        EvaluationSetting(None, num_data=0),
    ):
        with failing("usable()", "it is asked before anything loads, and answers with None or a reason"):
            said = subject.cls.usable(setting)
        expect(
            said is None or (isinstance(said, str) and said), f"usable() returned {said!r}", "return None or a reason"
        )


def _make(subject: Subject) -> Any:
    subject.need_packages()
    setting = EvaluationSetting(None, num_data=SIZE)
    reason = subject.cls.usable(setting)
    if reason:
        raise NotApplicable(f"without a model it is not usable: {reason}")
    with failing("making it", "its __init__ takes the settings and an EvaluationSetting"):
        return subject.cls(subject.config(), setting)


def _images(seed: int) -> Tensor:
    coarse = torch.rand(SIZE, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear").clamp(0, 1)


def _samples() -> Samples:
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(SIZE)]
    return Samples(_images(0), prompts, reference=_images(1), data=_images(2))


def _score(evaluator: Any, samples: Samples) -> dict[str, float]:
    with failing("score()", "it is given images (N, 3, H, W) in [0, 1] with their prompts"):
        scores = evaluator.score(samples)
    expect(isinstance(scores, dict), f"score() returned a {type(scores).__name__}", "return {name: number}")
    declared = evaluator.higher_is_better
    for name, value in scores.items():
        expect(name in declared, f"the score {name!r} is not in higher_is_better, which has {sorted(declared)}",
               "say there of each score whether more is better")  # fmt: skip
        number = isinstance(value, int | float) and not isinstance(value, bool)
        expect(number, f"the score {name!r} is a {type(value).__name__}", "return plain numbers: float(tensor)")
        expect(math.isfinite(value), f"the score {name!r} is {value}", "leave out what cannot be measured")
    return scores


def _scores(subject: Subject) -> None:
    scores = _score(_make(subject), _samples())
    expect(scores, "score() returned nothing for images with a reference and data", "return at least one score")


def _same(subject: Subject) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        evaluator = _make(subject)
        found += [_score(evaluator, _samples()), _score(evaluator, _samples())]
    expect(
        all(scores == found[0] for scores in found),
        f"the same images got {found[0]} and then {next((each for each in found if each != found[0]), None)}",
        "draw from a generator with a fixed seed, and keep nothing from one call to the next",
    )


def _bare(subject: Subject) -> None:
    samples = _samples()
    _score(_make(subject), Samples(samples.images, samples.prompts))
    _score(_make(subject), Samples(samples.images[:1], samples.prompts[:1], samples.images[:1], samples.data))


def _untouched(subject: Subject) -> None:
    samples = _samples()
    _score(_make(subject), samples)
    expect(torch.equal(samples.images, _images(0)), "score() changed the images that it was given", "copy them first")
