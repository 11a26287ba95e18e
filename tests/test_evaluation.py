"""Distances against closed forms, evaluation of a fake family, evaluators, model card, publishers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distill.core.cli.evaluate import read_steps
from distill.core.config.load import load_configuration
from distill.core.errors import UserError
from distill.core.evaluation import evaluate as evaluating
from distill.core.evaluation.distances import frechet_distance, kernel_distance, relative_spread, root_mean_square
from distill.core.evaluation.evaluate import evaluate
from distill.core.evaluation.evaluate_run import num_real_images
from distill.core.evaluation.evaluators import build_evaluators
from distill.core.evaluation.plan import fast_solver, plan_evaluation
from distill.core.evaluation.result import format_score
from distill.core.plugin_api.evaluator import EvaluationSetting, Samples
from distill.core.plugin_api.family import ExportInfo, ExtraLora
from distill.core.registry.registry import Registry
from distill.core.runs.finished import ExportedNetworks, parse_loras
from distill.core.runs.model_card import without_folders, write_model_card
from distill.core.runs.publishing import Publishers, build_publishers
from distill.plugins.evaluators import ImageDistance, MiniatureClassifierEvaluator, RandomConvolutions
from distill.plugins.hub import HuggingFaceHub
from huggingface_hub import ModelCard
from PIL import Image
from support.fake_family import FakeFamily, FakeNetworks, fake_sampler, image

# -- distances ---------------------------------------------------------------------------------------------------------


def exact_samples(mean: torch.Tensor, covariance: torch.Tensor, count: int = 400) -> torch.Tensor:
    """Samples whose *empirical* mean and covariance are exactly those given."""
    raw = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = raw - raw.mean(dim=0)
    whitener = torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T)))
    return raw @ whitener.T @ torch.linalg.cholesky(covariance).T + mean


def rotation(size: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]


def test_with_few_samples_the_frechet_distance_is_that_of_the_covariances():
    """The root of the product by a general eigenvalue problem of the full size."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 7, generator=g).double(), torch.randn(30, 7, generator=g).double() + 1
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_gaussians_that_share_their_axes():
    """There it is |m_a - m_b|^2 + sum (s_a - s_b)^2, in any rotated frame."""
    spread_a, spread_b = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 2.0, 0.5, 3.0], [1.5, 2.0, 1.0, 0.1]))
    mean_a, mean_b = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 1, 2, 3], [1.0, 1, 0, 3]))
    q = rotation(4)
    a = exact_samples(q @ mean_a, q @ torch.diag(spread_a**2) @ q.T)
    b = exact_samples(q @ mean_b, q @ torch.diag(spread_b**2) @ q.T)
    expected = float((mean_a - mean_b).square().sum() + (spread_a - spread_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_with_other_axes():
    """Against the matrix square root of the unsymmetric product, by its eigenvalues."""
    q = rotation(5)
    covariance_a = torch.diag(torch.tensor([1.0, 4, 0.3, 2, 9], dtype=torch.float64))
    covariance_b = q @ torch.diag(torch.tensor([2.0, 0.5, 1, 7, 0.2], dtype=torch.float64)) @ q.T
    zero = torch.zeros(5, dtype=torch.float64)
    cross = torch.linalg.eigvals(covariance_a @ covariance_b).real.sqrt().sum()
    expected = float(covariance_a.trace() + covariance_b.trace() - 2 * cross)
    found = frechet_distance(exact_samples(zero, covariance_a), exact_samples(zero, covariance_b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_sound_where_covariances_are_singular_or_far_from_the_origin():
    line = (
        torch.randn(50, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) @ torch.ones(1, 8).double()
    )
    assert frechet_distance(line, line) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(line.float() + 1e3, line.float() + 1e3) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(line, line + 2) == pytest.approx(8 * 4, rel=1e-6)
    assert frechet_distance(line[:, :1], 3 * line[:, :1]) == pytest.approx(
        float((2 * line[:, 0].std()) ** 2 + (2 * line[:, 0].mean()) ** 2), rel=1e-6
    )


def test_kernel_distance_against_its_definition():
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(7, 3, generator=g), torch.randn(5, 3, generator=g) + 0.5
    x, y = (a - b.mean(0)).double(), (b - b.mean(0)).double()
    scale = y.square().sum(1).mean()

    def kernel(u: torch.Tensor, v: torch.Tensor) -> float:
        return float((u @ v / scale + 1) ** 3)

    within_x = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    within_y = sum(kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(kernel(u, v) for u in x for v in y) / 35
    assert kernel_distance(a, b) == pytest.approx(within_x + within_y - 2 * across, rel=1e-5)


def test_kernel_distance_has_no_bias_at_few_samples_and_does_not_depend_on_the_unit():
    g = torch.Generator().manual_seed(4)
    same = [kernel_distance(torch.randn(20, 6, generator=g), torch.randn(20, 6, generator=g)) for _ in range(200)]
    error = torch.tensor(same).std() / len(same) ** 0.5
    assert abs(sum(same) / len(same)) < 4 * error
    assert min(same) < 0
    a, b = torch.randn(40, 6, generator=g) + 1, torch.randn(40, 6, generator=g)
    assert kernel_distance(a, b) > 10 * float(error)
    assert kernel_distance(100 * a - 7, 100 * b - 7) == pytest.approx(kernel_distance(a, b), rel=1e-3)


def test_root_mean_square_is_per_image():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.5), torch.zeros(3, 4, 4)])
    assert root_mean_square(a, b).tolist() == [0.5, 0.0]


# -- evaluators --------------------------------------------------------------------------------------------------------

ANYWHERE = EvaluationSetting(model_path=None)


def make_images(count: int, away: float = 0.0, edge: int = 32) -> torch.Tensor:
    return torch.stack([image(1, seed, away, edge, edge) for seed in range(count)])


def test_picture_distance_is_to_the_image_of_the_same_noise():
    score = ImageDistance(ImageDistance.Config(), ANYWHERE).score
    prompts = ["a"] * 4
    assert score(Samples(make_images(4), prompts, reference=make_images(4) + 0.25)) == {
        "distance_to_teacher_pixels": pytest.approx(0.25)
    }
    assert score(Samples(make_images(4), prompts)) == {}


def test_random_convolutions_tell_more_distant_images_apart():
    evaluator = RandomConvolutions(RandomConvolutions.Config(), ANYWHERE)
    data = torch.stack([image(2, seed, 0.0, 32, 32) for seed in range(100)])
    scores = [evaluator.score(Samples(make_images(100, away), ["a"] * 100, data=data)) for away in (0.0, 0.3, 0.9)]
    for name in ("kernel_distance_to_data_random_convolutions", "frechet_distance_to_data_random_convolutions"):
        values = [score[name] for score in scores]
        assert values == sorted(values)
        assert values[2] > 5 * values[0]
        assert evaluator.higher_is_better[name] is False


def test_random_convolutions_are_the_same_everywhere_and_see_the_arrangement():
    first, second = (RandomConvolutions(RandomConvolutions.Config(), ANYWHERE) for _ in range(2))
    images = make_images(4)
    assert torch.equal(first.features(images), second.features(images))
    shuffled = images.flatten(2)[:, :, torch.randperm(32 * 32, generator=torch.Generator().manual_seed(0))]
    change = (first.features(shuffled.reshape(images.shape)) - first.features(images)).abs().mean()
    assert change > 0.05, "features that see only the colours would not change"


def test_few_images_have_no_frechet_distance_and_no_data_no_distance():
    evaluator = RandomConvolutions(RandomConvolutions.Config(), ANYWHERE)
    prompts = [f"prompt {number}" for number in range(8)]
    assert list(evaluator.score(Samples(make_images(8), prompts, data=make_images(100)))) == [
        "kernel_distance_to_data_random_convolutions"
    ]
    assert evaluator.score(Samples(make_images(8), ["a"] * 8)) == {}


def test_diversity_is_none_for_one_image_many_times_and_one_for_images_that_differ_as_the_data_does():
    reference = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "b"] * 100
    same = torch.stack([torch.zeros(6), torch.ones(6)]).repeat(100, 1)
    assert relative_spread(same, prompts, reference) == 0
    drawn = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    assert relative_spread(drawn, prompts, reference) == pytest.approx(1, abs=0.05)
    assert relative_spread(drawn / 2, prompts, reference) == pytest.approx(0.5, abs=0.03)
    assert relative_spread(drawn, list(range(200)), reference) is None, "no prompt has two images"


@pytest.fixture
def model_with_classifier(tmp_path: Path) -> Path:
    from distill.plugins.miniature_classifier import MiniatureClassifier

    torch.manual_seed(0)
    MiniatureClassifier({"thing": ["cat", "dog"]}, channels=(4, 4, 4, 8), resolution=16).save_pretrained(
        tmp_path / "model" / "judge"
    )
    return tmp_path / "model"


def test_the_miniature_classifier_is_used_where_the_model_has_one(tmp_path, model_with_classifier):
    assert "judge/" in (MiniatureClassifierEvaluator.usable(ANYWHERE) or "")
    assert MiniatureClassifierEvaluator.usable(EvaluationSetting(model_path=tmp_path))
    setting = EvaluationSetting(model_path=model_with_classifier)
    assert MiniatureClassifierEvaluator.usable(setting) is None
    evaluator = MiniatureClassifierEvaluator(MiniatureClassifierEvaluator.Config(), setting)
    images = make_images(200)
    as_cats = evaluator.score(Samples(images, ["a cat"] * 200, data=images))
    as_dogs = evaluator.score(Samples(images, ["a dog"] * 200, data=images))
    assert as_cats["prompt_agreement_judge"] + as_dogs["prompt_agreement_judge"] == pytest.approx(1)
    assert as_cats["frechet_distance_to_data_judge"] == pytest.approx(0, abs=1e-9)
    assert set(as_cats) == set(evaluator.higher_is_better), "it declares what its own judge answers, and no more"


# -- evaluation --------------------------------------------------------------------------------------------------------


def plan_for(family: FakeFamily, **changes: object):
    values: dict = {
        "prompts": ["a red fish", "two birds", "a tree"],
        "num_samples": 70,
        "seed": 10,
        "resolution": (32, 32),
        **changes,
    }
    return plan_evaluation(family, lambda steps: fake_sampler(steps), **values)


def run_evaluation(family: FakeFamily, tmp_path: Path, *, data: torch.Tensor | None = None):
    plan = plan_for(family)
    registry = Registry.load(installed=False)
    usual = [each for name in registry.names("evaluator") if (each := registry.get("evaluator", name)).by_default]
    config = SimpleNamespace(evaluators={each.name: each.Config() for each in usual})
    evaluators, left_out = build_evaluators(registry, config, ANYWHERE)  # type: ignore[arg-type]
    return evaluate(family, FakeNetworks(), plan, evaluators, data=data, left_out=left_out)


def test_all_start_from_the_same_noise_and_the_teacher_has_one_guidance(tmp_path):
    family = FakeFamily()
    found = run_evaluation(family, tmp_path)
    assert [(row.sampling_plan.name, row.sampling_plan.steps) for row in found.rows] == [
        ("teacher", 4), ("teacher, DPM++ 2M", 4), ("student", 1), ("student", 2), ("student", 4), ("student", 8),
        ("teacher", 50),
    ]  # fmt: skip
    assert {row.sampling_plan.guidance for row in found.rows if row.sampling_plan.role == "teacher"} == {7.0}
    full: dict[tuple, list[int]] = {}
    for call in family.calls:
        if len(call.seeds) > 1:
            full.setdefault((call.role, call.scheduler, call.steps), []).extend(call.seeds)
    made = {key: seeds for key, seeds in full.items() if len(seeds) >= 70}
    assert len(made) == 7
    # the student is warmed up with a step of its own sampler, at the batch size that is timed
    warmed = made.pop(("student", "LCMScheduler", 1))
    assert warmed == [*range(10, 74), *range(10, 80)]
    assert all(seeds == list(range(10, 80)) for seeds in made.values())
    assert max(len(call.seeds) for call in family.calls) == 64, "in batches"


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_processes_that_sample_together_make_as_many_images_whatever_their_clocks_say(monkeypatch, limit):
    monkeypatch.setattr(evaluating, "LATENCY_SECONDS", limit)
    family, answers = FakeFamily(), iter([True, True, False] * 100)
    own: list[bool] = []

    def any_process(flag: bool) -> bool:
        own.append(flag)
        return next(answers)

    found = evaluate(family, FakeNetworks(), plan_for(family, num_samples=2), {}, any_process=any_process)
    single = [call for call in family.calls if len(call.seeds) == 1]
    assert len(single) == 2 * len(found.rows) + 2, "two of each way, and one to warm up each role"
    assert own == [bool(limit)] * 3 * len(found.rows)


def test_a_fast_solver_that_the_pipeline_does_not_take_is_left_out_and_nothing_else(said):
    family = FakeFamily()
    generate = family.generate

    def refusing(*args, sampler, **kwargs):
        if sampler is not None and sampler.scheduler == refused:
            raise ValueError("does not support custom sigmas schedules")
        return generate(*args, sampler=sampler, **kwargs)

    family.generate = refusing  # type: ignore[method-assign]
    refused = "DPMSolverMultistepScheduler"
    found = evaluate(family, FakeNetworks(), plan_for(family, num_samples=2), {})
    assert [row.sampling_plan.name for row in found.rows] == ["teacher", *["student"] * 4, "teacher"]
    assert any("teacher, DPM++ 2M is left out" in line and "custom sigmas" in line for line in said)
    assert said[0] == "scoring 7 ways of sampling, 2 images each", "how much is to be done, before it begins"
    refused = "LCMScheduler"
    with pytest.raises(ValueError, match="custom sigmas"):
        evaluate(family, FakeNetworks(), plan_for(family, num_samples=2), {})


def test_scores_order_the_sampling_plans_by_quality(tmp_path):
    data = torch.stack([image(sum(b"a red fish") % 997, seed, 0.0, 32, 32) for seed in range(100)])
    found = run_evaluation(FakeFamily(), tmp_path, data=data)
    distance = {
        (row.sampling_plan.role, row.sampling_plan.steps): row.scores.get("distance_to_teacher_pixels")
        for row in found.rows
    }
    assert distance["teacher", 50] is None
    assert distance["student", 8] < distance["student", 4] < distance["student", 1] < distance["teacher", 4]
    kernel = [row.scores["kernel_distance_to_data_random_convolutions"] for row in found.rows]
    assert kernel[-1] == min(kernel)
    assert "judge" in found.left_out
    assert all(row.seconds_per_image > 0 and row.seconds_single > 0 for row in found.rows)


def test_evaluation_is_written_for_programs_and_for_people(tmp_path):
    from io import StringIO

    from rich.console import Console

    found = run_evaluation(FakeFamily(), tmp_path, data=make_images(60))
    found.loras = {"/styles/ink.safetensors": 0.8}
    files = found.save(tmp_path)
    assert [file.name for file in files] == ["evaluation.json", "evaluation.png"]
    read = json.loads(files[0].read_text())
    assert read == json.loads(json.dumps(found.to_json()))
    assert (read["num_samples"], read["num_data"], len(read["rows"])) == (70, 60, 7)
    assert read["rows"][2]["scores"] == found.rows[2].scores
    assert set(read["higher_is_better"]) == set(found.score_names)
    grid = Image.open(files[1])
    assert grid.width > 7 * 128
    assert grid.height > 8 * 128
    console = Console(file=StringIO(), width=220)
    console.print(found.table())
    text = console.file.getvalue()
    assert text.count("student") >= 4
    assert "DPM++ 2M" in text
    assert "distance" in text
    scalars = found.scalars()
    assert (
        scalars["scores/student_4_steps/distance_to_teacher_pixels"]
        == found.rows[4].scores["distance_to_teacher_pixels"]
    )
    assert all(name.replace("/", "").replace("_", "").isalnum() for name in scalars)
    assert found.markdown().count("\n") == 8


def test_repeated_step_counts_are_evaluated_once_in_order():
    plan = plan_for(FakeFamily(), steps=(4, 1, 4), teacher_steps=(50,), teacher_guidance=3.0)
    assert [(r.role, r.steps) for r in plan.sampling_plans] == [
        ("teacher", 50),
        ("student", 1),
        ("student", 4),
        ("teacher", 50),
    ]
    assert plan.reference.guidance == plan.sampling_plans[0].guidance == 3.0
    assert plan.sample_prompts[:4] == ["a red fish", "two birds", "a tree", "a red fish"]


def test_the_fast_solver_is_configured_for_the_models_prediction_type():
    import diffusers

    family = FakeFamily()
    noise = fast_solver(family, 4, 5.0)
    assert noise.sampler is not None
    assert noise.sampler.config["algorithm_type"] == "dpmsolver++"
    family.prediction_type, family.schedule = "flow", SimpleNamespace(shift=3.0)
    flow = fast_solver(family, 4, 5.0)
    assert flow.sampler is not None
    scheduler = diffusers.DPMSolverMultistepScheduler(**flow.sampler.config)
    scheduler.set_timesteps(4)
    assert scheduler.config["flow_shift"] == 3.0
    assert len(scheduler.timesteps) == 4


def test_evaluators_that_are_named_are_the_ones_used(tmp_path):
    (tmp_path / "images").mkdir()
    registry = Registry.load(installed=False)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "a", "instance_data_dir": "images"}]))
    flags = {"distillation_method": "lcm", "model_family": "sdxl", "output_dir": str(tmp_path / "out")}
    chosen = ["evaluators=picture_distance"]
    config = load_configuration(registry, data_file=data, flags=flags, overrides=chosen, to_train=False)
    usable, left_out = build_evaluators(registry, config, ANYWHERE)
    assert (list(usable), left_out) == (["picture_distance"], {})


def test_real_images_are_as_many_as_memory_allows():
    assert num_real_images(32, 32) == 1000
    assert num_real_images(1024, 1024) * 3 * 4 * 1024**2 <= 2**30


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (0.123456, "0.123"), (1234.5, "1.23e+03"), (2e-5, "2.0e-05")]
)
def test_scores_are_shown_with_three_digits(value, text):
    assert format_score(value) == text


# -- a finished run ----------------------------------------------------------------------------------------------------


def test_numbers_of_steps_on_the_command_line():
    assert read_steps("--steps", None) is None
    assert read_steps("--steps", "1, 2,8") == (1, 2, 8)
    for wrong in ("", "0", "1,x", "2000"):
        with pytest.raises(UserError, match="--steps"):
            read_steps("--steps", wrong)


def test_loras_on_the_command_line(tmp_path):
    file = tmp_path / "ink:1.safetensors"
    file.touch()
    assert parse_loras([str(file), f"{file}:0.5", "someone/a-style", "someone/a-style:-1"]) == (
        ExtraLora(str(file), 1.0), ExtraLora(str(file), 0.5), ExtraLora("someone/a-style"),
        ExtraLora("someone/a-style", -1),
    )  # fmt: skip
    for wrong, problem in ((str(tmp_path / "none.safetensors"), "does not exist"), ("someone/a:heavy", "not a weight")):
        with pytest.raises(UserError, match=problem):
            parse_loras([wrong])


def test_a_finished_runs_networks_are_loaded_one_at_a_time(tmp_path):
    loaded: list[str] = []

    class Loading(FakeFamily):
        def load_network(self):
            loaded.append(f"teacher {self.settings.teacher_lora}")
            return torch.nn.Identity()

        def load_student(self, folder, *, extra_loras=()):
            loaded.append(f"student {folder.name} {[lora.path for lora in extra_loras]}")
            return torch.nn.Identity()

    networks = ExportedNetworks(Loading(), tmp_path / "student", extra_loras=[ExtraLora("ink", 0.5)])
    for role in ("teacher", "teacher", "student", "student"):
        with networks.use(role):
            pass
    assert loaded == ["teacher (('ink', 0.5),)", "student student ['ink']"], "the LoRA stands on both sides"


# -- model card --------------------------------------------------------------------------------------------------------


def test_the_model_card_shows_use_scores_and_config_but_no_folders(tmp_path):
    student = tmp_path / "student"
    student.mkdir()
    grid = tmp_path / "grid.png"
    Image.new("RGB", (8, 8)).save(grid)
    resolved = {
        "output_dir": "/home/somebody/out/sdxl-lcm",
        "learning_rate": 1e-4,
        "data": [{"dir": "/home/somebody/p"}],
    }
    run = SimpleNamespace(
        distillation_method="lcm",
        model_family="fake",
        model_type="lora",
        tracker_run_name=None,
        output_dir=Path("/x/my-run"),
    )
    config = SimpleNamespace(run=run, miniature=False, resolved=lambda: resolved)
    family = FakeFamily()
    info = ExportInfo(sampler=fake_sampler(4), model_type="lora")
    evaluation = run_evaluation(family, tmp_path, data=make_images(60))
    card = write_model_card(student, config, family, info, evaluation=evaluation, grid=grid).read_text()  # type: ignore[arg-type]
    assert ModelCard(card).data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "fake",
        "tags": ["distill", "distillation", "lcm", "fake", "lora"],
    }
    assert "print(4)" in card
    assert "| student | 4 | none |" in card
    assert '"learning_rate": 0.0001' in card
    assert "4 steps with no guidance" in card
    assert "/home/" not in card
    assert (student / "grid.png").is_file()
    assert (student / "evaluation.png").is_file()
    bare = write_model_card(student, config, family, info).read_text()  # type: ignore[arg-type]
    assert "## Scores" not in bare
    assert "## Images" not in bare
    config.miniature, run.distillation_method, run.model_type = True, "on: {off}", "distill"
    found = ModelCard(write_model_card(student, config, family, info).read_text()).data.to_dict()  # type: ignore[arg-type]
    assert "base_model" not in found
    assert found["tags"] == ["distill", "distillation", "on: {off}", "fake"]


def test_folders_are_cut_down_to_their_last_part():
    value = {"a": ["/x/y", "y/z", "~/k"], "b": 1, "c": "plain"}
    assert without_folders(value) == {"a": ["y", "y/z", "k"], "b": 1, "c": "plain"}


# -- publishing --------------------------------------------------------------------------------------------------------


def hub(model_id: str | None) -> HuggingFaceHub:
    return HuggingFaceHub(HuggingFaceHub.Config(model_id=model_id))


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.parametrize(
    ("model_id", "problem"),
    [
        (None, "missing"),
        ("no-slash", "not of the form"),
        ("your-username/sdxl-lcm-distilled", "placeholder"),
        ("<user>/sdxl", "not of the form"),
        ("username/sdxl", "placeholder"),
        ("myriad-labs/sdxl-lcm", None),
        ("organic/sdxl", None),
    ],
)
def test_the_hub_says_at_the_start_what_would_keep_it_from_working(token, model_id, problem):
    problems = hub(model_id).problems()
    assert len(problems) == (problem is not None)
    if problem:
        assert problem in problems[0]


def test_a_missing_token_and_offline_mode_are_said(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "HF_TOKEN" in hub("labs/x").problems()[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in hub("labs/x").problems()[0]


def test_the_hub_gets_the_folder(monkeypatch, token, tmp_path):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo_id, *, private, exist_ok, repo_type):
            calls.append((repo_id, private, exist_ok, repo_type))
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub("labs/x").publish(tmp_path) == "https://hub.example/labs/x"
    assert calls == [("labs/x", False, True, "model"), ("labs/x", str(tmp_path))]


@pytest.mark.parametrize(
    ("push", "publish_to", "wanted"), [(True, (), True), (False, ("hub",), True), (False, (), False)]
)
def test_push_to_hub_asks_for_the_hub(push, publish_to, wanted):
    run = SimpleNamespace(push_to_hub=push, publish_to=publish_to, hub_model_id="labs/x")
    config = HuggingFaceHub.from_run(run, None)  # type: ignore[arg-type]
    assert (config is not None) == wanted
    assert config is None or config.model_id == "labs/x"


def test_a_publisher_with_a_problem_is_said_at_the_start_and_never_asked(monkeypatch, token, tmp_path):
    run = SimpleNamespace(
        push_to_hub=True, publish_to=(), hub_model_id="your-username/x", tracker_run_name="x", model_type="lora",
        model_family="sdxl",
    )  # fmt: skip
    configuration = SimpleNamespace(run=run, publishers={})
    publishers, warnings = build_publishers(Registry.load(installed=False), configuration)  # type: ignore[arg-type]
    assert len(warnings) == 1
    assert "placeholder" in warnings[0]
    assert publishers.publish(tmp_path) == []


def test_a_publisher_that_fails_ends_nothing(tmp_path, said):
    class Failing(HuggingFaceHub):
        def publish(self, student):
            raise ConnectionError("cut")

    assert Publishers({"hub": Failing(Failing.Config())}).publish(tmp_path) == []
    assert "cut" in said[0]
    assert str(tmp_path) in said[0]
