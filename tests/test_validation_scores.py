"""Scores of validations: of the evaluators, of the same samples each time; the best, and whether a run got worse."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from distill.core.engine.tracking import Trackers
from distill.core.evaluation.evaluate import evaluate
from distill.core.evaluation.evaluate_run import ComparisonData
from distill.core.evaluation.plan import plan_evaluation
from distill.core.evaluation.sampling import SamplingPlan
from distill.core.evaluation.validation_scores import Course, ValidationScorer, ValidationScores
from distill.core.plugin_api.evaluator import EvaluationSetting, Evaluator, Samples
from distill.plugins.clip_scores import Reward
from distill.plugins.evaluators import ImageDistance, RandomConvolutions
from distill.plugins.torchscript_scores import InceptionDistance, PerceptualDistance
from support.fake_family import FakeFamily, FakeNetworks, fake_sampler

PROMPTS = ("a red fish", "two birds", "a house")
SEED = 5


class Brightness(Evaluator):
    """Draws from the global generator, as nothing should."""

    name = "brightness"
    by_default = False
    higher_is_better = {"brightness": True}

    def score(self, samples: Samples) -> dict[str, float]:
        torch.rand(3)
        assert samples.reference is None
        return {"brightness": float(samples.images.mean()), "undecided": 1.0, "broken": float("nan")}


class Failing(Evaluator):
    """Fails."""

    name = "failing"
    calls = 0

    def score(self, samples: Samples) -> dict[str, float]:
        Failing.calls += 1
        raise ValueError("no such images")


USED = {each.name: each for each in (ImageDistance, RandomConvolutions, Failing, Brightness)}


def real_images(count: int, width: int, height: int) -> torch.Tensor:
    real_images.calls += 1
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (12, 3, height, width), generator=generator).float() / 255


def scorer_of(family: FakeFamily, count: int, **changes) -> ValidationScorer:
    real_images.calls = 0
    run = SimpleNamespace(validation_scores_num_samples=count, seed=SEED, evaluators=(), **changes)
    evaluators = {name: each.Config() for name, each in USED.items()}
    registry = SimpleNamespace(get=lambda kind, name: USED[name])
    return ValidationScorer(
        SimpleNamespace(run=run, evaluators=evaluators), registry, family,  # type: ignore[arg-type]
        student=SamplingPlan("student", "student", fake_sampler(), 4, 0.0),
        data=ComparisonData(PROMPTS, real_images), resolution=(32, 32),
    )  # fmt: skip


def test_each_validation_scores_the_same_samples_as_the_evaluation_does(tmp_path, said):
    """With the evaluators that somebody asked for first; one that fails is asked once, and the rest is scored."""
    family, seen, Failing.calls = FakeFamily(), [], 0
    scorer = scorer_of(family, 16)
    scorer.prepare()
    family.calls.clear()
    tracker = SimpleNamespace(log=lambda metrics, step: seen.append((metrics, step)))
    state = torch.random.get_rng_state()
    for step in (10, 20):
        folder = tmp_path / "validation" / f"step-{step:06d}"
        scorer.run(step, FakeNetworks(), Trackers([("t", tracker)]), folder=folder)  # type: ignore[list-item]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert real_images.calls == Failing.calls == 1
    assert [(call.role, call.seeds) for call in family.calls] == [("student", tuple(range(SEED, SEED + 16)))] * 2
    first, second = (ValidationScores.read(tmp_path / f"validation/step-{step:06d}/scores.json") for step in (10, 20))
    assert first.scores == second.scores
    assert first.compares_with(second)
    assert seen == [({f"validation/{name}": value for name, value in first.scores.items()}, step) for step in (10, 20)]
    kernel = "kernel_distance_to_data_random_convolutions"
    assert list(first.scores) == ["brightness", "undecided", kernel, "diversity_random_convolutions"]
    assert len(first.parts[kernel]) == 4
    assert sum(first.parts["brightness"]) / 4 == pytest.approx(first.scores["brightness"])
    assert first.left_out == {
        "failing": "it failed: ValueError: no such images",
        "broken": "it is nan",
        "distance_to_teacher_pixels": "it compares with the full teacher's images, of which there are none",
        "frechet_distance_to_data_random_convolutions": "it needs more than 48 images, the number of features",
    }
    assert sum("validation_scores leaves out" in line for line in said) == 1, "what is left out is said once"

    plan = plan_evaluation(
        family, lambda steps: fake_sampler(steps), prompts=PROMPTS, num_samples=20, seed=SEED, resolution=(32, 32),
        steps=[4], teacher_steps=[4, 50],
    )  # fmt: skip
    data, evaluators = real_images(12, 32, 32), {"random": RandomConvolutions(None, EvaluationSetting(None))}
    found = evaluate(family, FakeNetworks(), plan, evaluators, data=data, first=16).to_json()
    assert found["validation_reference"]["samples"] == first.samples, "the teacher's first samples are those"
    whole = found["rows"][-1]["scores"][kernel]
    assert found["validation_reference"]["scores"][kernel] != whole
    assert "validation_reference" not in evaluate(family, FakeNetworks(), plan, evaluators, first=21).to_json()


def test_processes_that_only_help_make_images_and_write_nothing(tmp_path):
    family = FakeFamily()
    scorer = scorer_of(family, 4)
    scorer._writes = False
    scorer.run(1, FakeNetworks(), Trackers([]), folder=tmp_path / "validation" / "step-000001")
    assert len(family.calls) == 1
    assert not list(tmp_path.iterdir())


def test_evaluators_say_what_they_leave_out_and_why():
    """What one declares, it gives or names."""
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alone, setting = Samples(images, ["a"] * 3), EvaluationSetting(None)
    wants = "it needs 2 images on either side, and there are 0"
    random = RandomConvolutions(None, setting)
    assert random.unscored(alone) == dict.fromkeys(RandomConvolutions.higher_is_better, wants)
    beside = Samples(images, ["a"] * 3, None, images)
    assert {*random.score(beside), *random.unscored(beside)} == set(random.higher_is_better)
    fid = InceptionDistance(InceptionDistance.Config(), setting)
    assert fid.unscored(beside) == {"fid": "it needs 2,048 images on either side, and there are 3"}
    assert list(fid.unscored(alone)) == ["fid", "kid"]
    for each in (ImageDistance(None, setting), PerceptualDistance(PerceptualDistance.Config(), setting)):
        assert set(each.unscored(beside)) == set(each.higher_is_better)
        assert not each.unscored(Samples(images, ["a"] * 3, images))
    assert list(Reward(Reward.Config(), setting).unscored(alone)) == ["chosen_over_teacher_pickscore_v1"]


# -- the best, and getting worse -------------------------------------------------------------------------------------


def course(*scores: float, spread: float = 0.0, better: bool = True, **changes) -> Course | None:
    """Of validations at steps 10, 20, ...; parts lie around each score, further in later validations."""
    signs = (-1, 1, 1, -1)
    found = [
        ValidationScores(
            10 * number, {"num_samples": 64}, {"steps": 2}, {"quality": better}, {"undecided": 0.0, "quality": score},
            {"quality": [score + sign * spread * number for sign in signs]}, {},
        )
        for number, score in enumerate(scores, 1)
    ]  # fmt: skip
    return Course.of(found, last_step=changes.get("last_step", 10_000))


def test_the_best_is_by_the_direction_of_the_first_score_that_has_one():
    high, low = course(0.2, 0.9, 0.9, 0.5), course(0.2, 0.9, 0.1, 0.5, better=False)
    assert high
    assert low
    assert (high.ranked_by, high.best().step) == ("quality", 20), "the earliest of equal ones"  # type: ignore[union-attr]
    assert low.best().step == 30  # type: ignore[union-attr]
    assert high.best("undecided") is None


@pytest.mark.parametrize(
    ("scores", "spread", "better", "worse"),
    [
        ((0.2, 0.9, 0.4), 0.0, True, True),
        ((0.9, 0.2, 0.7), 0.0, False, True),
        ((0.2, 0.9, 0.8), 0.0, True, False),  # little of what was gained
        ((0.2, 0.9, 0.4), 0.6, True, False),  # the parts do not agree
        ((0.2, 0.4, 0.9), 0.0, True, False),  # the last is the best
        ((0.9,), 0.0, True, False),
    ],
)
def test_a_run_is_worse_where_much_was_lost_and_the_parts_agree(scores, spread, better, worse):
    found = course(*scores, spread=spread, better=better)
    assert found
    said = found.worse()
    assert (said is not None) == worse
    if worse:
        assert "the run got worse after step 20: quality was" in str(said)


def test_only_what_compares_with_the_newest_is_compared():
    """Not validations of other samples, nor those of a time before the run was resumed from an earlier step."""
    found = course(0.2, 0.9, 0.4, last_step=20)
    assert found
    assert [each.step for each in found.validations] == [10, 20]
    other = ValidationScores(30, {"num_samples": 8}, {"steps": 2}, {"quality": True}, {"quality": 0.1}, {}, {})
    mixed = Course.of([*found.validations, other], last_step=30)
    assert mixed
    assert ([each.step for each in mixed.validations], mixed.num_others) == ([30], 2)
    assert Course.of([], last_step=3) is None


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"step": "x"}', b"\xff"])
def test_a_damaged_file_is_a_value_error(tmp_path, content):
    (tmp_path / "scores.json").write_bytes(content)
    with pytest.raises(ValueError, match="."):
        ValidationScores.read(tmp_path / "scores.json")


def test_what_is_written_reads_back(tmp_path):
    found = ValidationScores(3, {"prompts": "x"}, {"steps": 2}, {"a": False}, {"a": 0.1}, {"a": [0.1, 0.2]}, {"b": "c"})
    (tmp_path / "scores.json").write_text(json.dumps(vars(found)))
    assert ValidationScores.read(tmp_path / "scores.json") == found
