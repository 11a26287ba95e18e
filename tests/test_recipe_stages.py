"""Stages inside a recipe: KD, then DMD2, from one file, each with its learning rate and only its own networks."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from distill.core.engine.lr import lr_lambda, staged
from distill.core.errors import UserError
from distill.core.plugin_api.method import MethodSetup
from distill.core.plugin_api.stage import Stage, StageSettings, lengths_by_share, stages_of_settings
from distill.core.registry.registry import Registry
from distill.core.runs.components import RunComponents
from support.config_files import Pair, distill, said
from support.recipes import PLUGIN, recipe, term
from support.resuming import resumed_equals_whole

WARM_UP = {"name": "warm-up", "share": 2000, "learning_rate": 1e-5}
MATCHING = {"name": "matching", "share": 24000, "learning_rate": 5e-7, "reset_optimizer": True}
KD = term("kd", stage_weights={"matching": 0.0}, num_inference_steps=1)
DMD2 = term("dmd2", stage_weights={"warm-up": 0.0}, num_inference_steps=1)


@pytest.fixture(scope="module")
def registry():
    return Registry.load([PLUGIN], installed=False)


def lengths(total, *stages):
    return [stage.num_steps for stage in stages_of_settings([StageSettings(**each) for each in stages], total)]


# -- lengths, rates ---------------------------------------------------------------------------------------------------


def test_lengths_are_steps_as_named_and_shares_of_the_rest():
    a, b, c = ({"name": name} for name in "abc")
    assert lengths(26000, WARM_UP, MATCHING) == [2000, 24000]
    assert lengths(13, WARM_UP, MATCHING) == [1, 12]
    assert lengths(100, {**a, "steps": 20}, b, c) == [20, 40, 40]
    assert lengths(100, {**a, "steps": 20}, {**b, "share": 3}, c) == [20, 60, 20]
    assert lengths(30, {**a, "steps": 10}, {**b, "steps": 20}) == [10, 20]
    assert all(sum(lengths_by_share(total, [1, 1, 2])) == total for total in range(4, 60))


@pytest.mark.parametrize(
    ("total", "stages", "words"),
    [
        (25, [{"name": "a", "steps": 10}, {"name": "b", "steps": 20}], "= 25: .* a 10, b 20\nset .* to 30"),
        (10, [{"name": "a", "steps": 10}, {"name": "b"}], "a 10, b 0\nset max_train_steps to at least 11"),
        (5, [{"name": "a", "steps": 10}, {"name": "b"}], "to at least 11"),
        (2, [WARM_UP, MATCHING], "warm-up 0, matching 2\n.* at least 2"),
    ],
)  # fmt: skip
def test_lengths_that_do_not_fit_are_refused_with_what_would(total, stages, words):
    with pytest.raises(UserError) as caught:
        lengths(total, *stages)
    assert re.search(words, f"{caught.value.message}\n{caught.value.remedy}"), caught.value


def test_a_stage_has_its_own_learning_rate_with_its_own_warm_up_and_decay():
    stages = [Stage("a", 4), Stage("b", 6, learning_rate=1e-5), Stage("c", 3, learning_rate=1e-5), Stage("d", 2)]
    make = lambda length: lr_lambda("linear", 2, length)  # noqa: E731
    found = staged(make, stages, learning_rate=1e-4)
    first, second, last = make(4), make(9), make(2)
    wanted = [*map(first, range(4)), *(0.1 * second(step) for step in range(9)), *map(last, range(2))]
    assert [found(step) for step in range(15)] == pytest.approx(wanted)
    shapes = [*map(first, range(4)), *map(second, range(9)), *map(last, range(2))]
    own = staged(make, stages)
    assert [own(step) for step in range(15)] == shapes, "a role with a rate of its own keeps it; warm-up begins anew"


# -- what counts where ------------------------------------------------------------------------------------------------


def test_stages_sampler_and_notices(registry):
    config = recipe(registry, KD, DMD2, stages=[WARM_UP, MATCHING])
    found = registry.get("method", "recipe")
    first, second = found.stages(config, total_steps=26000)
    assert (first.name, first.num_steps, first.learning_rate, first.reset) == ("warm-up", 2000, 1e-5, ())
    assert (second.num_steps, second.learning_rate, second.reset) == (24000, 5e-7, ("student",))
    method = found(config, MethodSetup("full"))
    assert method._sampled.name == "dmd2", "the last stage's"
    assert method.notices()[1:3] == [
        "recipe: stage warm-up (share 2000, learning rate 1e-05): kd",
        "recipe: stage matching (share 24000, learning rate 5e-07): dmd2",
    ]
    named = recipe(registry, KD, DMD2, stages=[WARM_UP, MATCHING], sampler="kd")
    assert found(named, MethodSetup("full"))._sampled.name == "kd"


def test_a_term_that_counts_in_no_stage_has_no_networks_and_needs_no_data(registry):
    off = term("kd", stage_weights={"warm-up": 0.0, "matching": 0.0}, num_inference_steps=1)
    config = recipe(registry, off, DMD2, term("halves"), stages=[WARM_UP, MATCHING])
    found = registry.get("method", "recipe")
    assert found.requires(config, MethodSetup("lora")).trajectory_points == 0
    assert list(config.used) == ["dmd2", "halves"]
    needs = found.requires(recipe(registry, KD, DMD2, stages=[WARM_UP, MATCHING]), MethodSetup("lora"))
    assert (needs.images, needs.trajectory_points) == (False, 1)


def test_terms_may_train_one_network_in_turn_but_not_at_once(registry):
    found = registry.get("method", "recipe")
    pair = [term("turns", stage_weights={"b": 0.0}), term("turns", value=2.0, stage_weights={"a": 0.0})]
    stages = [{"name": "a"}, {"name": "b"}]
    roles = found.roles(recipe(registry, *pair, stages=stages), MethodSetup("lora"))
    assert [role.name for role in roles] == ["teacher", "student", "critic"]
    with pytest.raises(UserError, match="turns and turns-2 would both train 'critic'"):
        found.roles(recipe(registry, *pair, stages=[*stages, {"name": "c"}]), MethodSetup("lora"))


def test_stages_of_a_recipe_and_of_a_term_are_refused_together(registry):
    config = recipe(registry, term("halves"), stages=[{"name": "a"}, {"name": "b"}])
    with pytest.raises(UserError, match="its term halves has stages of its own .first, second"):
        registry.get("method", "recipe").stages(config, total_steps=4)


@pytest.mark.parametrize("name", ["progressive", "tcd"])
def test_a_term_of_one_stage_serves_every_stage_of_a_recipe(registry, name):
    """Neither looks the recipe's second stage up in its own list of one."""
    own = {"progressive": {"student_steps": [4]}, "tcd": {"segments": [2]}}[name]
    config = recipe(registry, term(name, **own), stages=[{"name": "a"}, {"name": "b", "learning_rate": 1e-4}])
    assert len(registry.get("method", "recipe").stages(config, total_steps=4)) == 2
    method = registry.get("method", name)(config.terms[0].settings, MethodSetup("lora"))
    context = type("At", (), {"stage": type("Second", (), {"index": 1})})
    if name == "progressive":
        assert method._phase(context).number == 0
    else:
        from distill.distill_methods.tcd import _of_stage

        assert _of_stage(config.terms[0].settings.stage_segments, context) == 2


# -- refusals through the configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said_so"),
    [
        ({"stages": [{"name": "a", "stpes": 3}]}, "stages.0.stpes = 3: is not a known key remedy: did you mean"),
        ({"stages": [{"name": "a", "steps": 0}]}, "stages.0.steps = 0"),
        ({"stages": [{"name": "a", "steps": 3, "share": 1}]}, "a has steps = 3 and share = 1: give one of them"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "has more than one stage named a"),
        ({"stages": []}, "recipe.stages = []"),
        ({"stages": [{"name": "a", "steps": 3}]}, "the stages do not fit max_train_steps = 40"),
        ({"stages": [{"name": "matching"}]}, "stage_weights of the term guidance names 'mathcing'"),
        ({"stages": [{"name": "mathcing"}, {"name": "b"}], "terms": [{"method": "lcm", "stage_weights": {"b": 0}}]},
         "no term of the recipe has a weight above 0 at step 20, in stage 'b'"),
    ],
)  # fmt: skip
def test_wrong_stages_are_refused_before_anything_loads(tmp_path, more, said_so):
    terms = [{"method": "lcm"}, {"method": "guidance", "stage_weights": {"mathcing": 0.5}}]
    part = {"terms": terms, **more}
    pair = Pair(
        tmp_path,
        {"distillation_method": "recipe", "max_train_steps": 40, "model_type": "lora",
         "distillation_config": {"recipe": part}},
    )  # fmt: skip
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 2, result.output
    assert said_so in said(result.stderr)


def parts_of_a_run(registry, optimizer, *stages, warm_up=0):
    """The parts of a run that its stages are compared with, and nothing else."""
    config = recipe(registry, term("lcm"), stages=list(stages))
    parts = object.__new__(RunComponents)
    parts.config = SimpleNamespace(method=config)
    parts.settings = SimpleNamespace(optimizer=optimizer, lr_warmup_steps=warm_up)
    plugin = registry.get("optimizer", optimizer)
    vars(parts).update(
        method=registry.get("method", "recipe")(config, MethodSetup("lora")), total_steps=10, optimizer_plugin=plugin
    )
    return parts


def test_an_optimizer_that_estimates_its_rate_takes_none_from_a_stage(registry):
    stages = [{"name": "a", "learning_rate": 1e-5}, {"name": "b"}]
    assert len(parts_of_a_run(registry, "adamw", *stages).stages) == 2
    with pytest.raises(UserError, match=r"prodigy: it estimates the learning rate by itself.*name one \(a\)"):
        _ = parts_of_a_run(registry, "prodigy", *stages).stages


def test_a_stage_that_is_shorter_than_its_warm_up_is_named(registry, caplog):
    a, b = {"name": "a", "steps": 3, "learning_rate": 1e-5}, {"name": "b"}
    for warm_up, words in ((3, ["'a' (3)"]), (2, []), (7, ["'a' (3)", "'b' (7)"])):
        caplog.clear()
        with caplog.at_level("WARNING"):
            _ = parts_of_a_run(registry, "adamw", a, b, warm_up=warm_up).stages
        assert [word for word in ("'a' (3)", "'b' (7)") if word in caplog.text] == words


# -- a run ------------------------------------------------------------------------------------------------------------


def test_kd_then_dmd2_from_images_and_trajectories_resumes_across_the_border_bit_for_bit(tmp_path):
    """Two steps of KD at 1e-3, four of DMD2 with its adversarial term at 5e-4, on one data file."""
    terms = [
        {"method": "kd", "stage_weights": {"matching": 0}, "config": {"num_inference_steps": 1}},
        {"method": "dmd2", "stage_weights": {"warm-up": 0},
         "config": {"num_inference_steps": 1, "guidance_scale": 2.0, "fake_updates_per_student_update": 2,
                    "gan_weight": 0.005}},
    ]  # fmt: skip
    stages = [
        {"name": "warm-up", "steps": 2},
        {"name": "matching", "share": 1, "learning_rate": 5e-4, "reset_optimizer": True},
    ]
    settings = {
        "distillation_method": "recipe", "distillation_config": {"recipe": {"terms": terms, "stages": stages}},
        "more_data": [{"id": "pairs", "dataset_type": "distillation_cache", "num_inference_steps": 2}],
        "max_train_steps": 6, "gradient_accumulation_steps": 1, "lr_scheduler": "linear", "lr_warmup_steps": 0,
        "validation_step_interval": 0, "checkpoint_step_interval": 1, "checkpoints_total_limit": 10,
    }  # fmt: skip
    whole = resumed_metrics(tmp_path, (2, 3), **settings)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert ["kd/loss" in row for row in rows] == [True, True, False, False, False, False]
    assert ["dmd2/loss" in row for row in rows] == [False, False, False, True, False, True]
    assert ["fake_score/loss" in row for row in rows] == [False] * 2 + [True] * 4
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx([1e-3, 5e-4, 5e-4 * 3 / 4, 5e-4 / 4])
    assert rows[2]["fake_score/lr"] == pytest.approx(5e-4), "the border's own rate"
    scheduler = json.loads((whole / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler"


def resumed_metrics(root, cuts, **settings):
    """As :func:`resumed_equals_whole`, which compares the losses of rows that all have one."""
    from support import resuming

    def rows(folder):
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        timed = ("samples_per_second", "wait_for_data_share")
        return [{name: value for name, value in row.items() if name not in timed} for row in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resuming, "losses", rows)
        return resumed_equals_whole(root, cuts, **settings)


def test_the_networks_of_a_later_stage_are_the_teachers_until_then(registry):
    """The fake score waits untouched, so that it begins as the teacher, as in DMD2."""
    from test_recipe import Training

    config = recipe(
        registry, term("lcm", num_ddim_timesteps=8, w_min=2.0, w_max=2.0, stage_weights={"b": 0.0}),
        term("turns", stage_weights={"a": 0.0}), stages=[{"name": "a"}, {"name": "b"}],
    )  # fmt: skip
    training = Training(registry, "recipe", config, total_steps=4)
    before = training.weights("critic")
    training.steps(2)
    assert all(torch.equal(p, q) for p, q in zip(before, training.weights("critic"), strict=True))
    training.steps(3)
    assert not all(torch.equal(p, q) for p, q in zip(before, training.weights("critic"), strict=True))
