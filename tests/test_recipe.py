"""A recipe is its terms: their losses in proportion, their own networks as alone; one term is that method."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.diffusion import FlowSchedule
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.errors import UserError
from distill.core.plugin_api.batch import Batch
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.method import MethodSetup
from distill.core.registry.registry import Registry
from distill.core.testing.gaussian import GaussianFamily, affine_of, gaussian_batch
from support.closed_form import GuidedFamily
from support.config_files import Pair, distill, said
from support.recipes import PLUGIN, recipe, term
from support.small_run import execute, losses, write_run
from support.tiny_sdxl import write_tiny_sdxl

SCHEDULE = FlowSchedule(shift=1.0, num_train_timesteps=8)
FULL = MethodSetup("full")


@pytest.fixture(scope="module")
def registry():
    return Registry.load([PLUGIN], installed=False)


class Training:
    """A method on Gaussian data, stepped by the engine's loop."""

    def __init__(self, registry, name, config, *, total_steps=20, lr=1e-2, family=GaussianFamily):
        found = registry.get("method", name)
        grid = SCHEDULE.grid(8)
        self.family = family(SCHEDULE, "flow", torch.cat([grid.previous[:1], grid.times]))
        self.total_steps = total_steps
        self.method, roles = found(config, FULL), found.roles(config, FULL)
        stages = found.stages(config, total_steps=total_steps)
        self.networks = Networks(self.family, roles, lora=None, seed=0, parameter_dtype=torch.float64)
        self.context = Context(Runtime(self.family, self.networks, seed=0, device=torch.device("cpu"), stages=stages))
        optimizers = {role: self._optimizer(role, lr) for role in self.networks.trained_roles()}
        self.loop = Loop(self.method, self.context, self.networks, optimizers, health=HealthMonitor(1), stages=stages)

    def _decay(self, step):
        return 0.5 * (1 + math.cos(math.pi * step / self.total_steps))

    def _optimizer(self, role, lr):
        parameters = self.networks.parameters(role)
        adam = torch.optim.Adam(parameters, lr=lr)
        return RoleOptimizer(adam, parameters, learning_rate=lr, schedule=self._decay, max_grad_norm=0)

    def steps(self, count, *, size=16):
        return [self.loop.step(step, [gaussian_batch(step, size, mean=0.6)]).metrics for step in range(count)]

    def weights(self, role="student"):
        return [p.detach().clone() for p in self.networks.parameters(role)]

    def gradient(self, step, size=16):
        """Of the student's one update at a step, and None where there is none."""
        batch = gaussian_batch(step, size, mean=0.6)
        found = None
        for update in self.method.updates(self.context.at(step, batch.positions), batch, step):
            if update.role == "student":
                assert found is None, "one update of the student per step"
                found = torch.autograd.grad(update.loss, self.networks.parameters("student"), allow_unused=True)
        return found


def config_of(registry, name, **settings):
    return registry.get("method", name).Config(**settings)


LCM = {"num_ddim_timesteps": 8, "num_inference_steps": 4, "w_min": 2.0, "w_max": 3.0}


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_one_term_of_weight_one_is_that_method_bit_for_bit(registry):
    for name, settings in (("lcm", LCM), ("turns", {})):
        alone = Training(registry, name, config_of(registry, name, **settings), family=GuidedFamilyToo)
        composed = Training(registry, "recipe", recipe(registry, term(name, **settings)), family=GuidedFamilyToo)
        ours, theirs = composed.steps(5), alone.steps(5)
        assert [m.get("loss") for m in ours] == [m.get("loss") for m in theirs]
        for role in alone.networks.trained_roles():
            assert all(torch.equal(p, q) for p, q in zip(alone.weights(role), composed.weights(role), strict=True))
        assert composed.method.result_role() == alone.method.result_role()


class GuidedFamilyToo(GaussianFamily):
    """Takes w and makes nothing of it."""


def test_the_gradient_is_the_weighted_sum_of_the_terms_gradients(registry):
    weight = {0: 0.0, 4: 2.0}
    composed = Training(
        registry, "recipe", recipe(registry, term("guidance", 0.5, w_min=2, w_max=2), term("turns", weight))
    )
    first = Training(registry, "guidance", config_of(registry, "guidance", w_min=2, w_max=2))
    second = Training(registry, "turns", config_of(registry, "turns"))
    for step, share, takes_turn in [(0, 0.0, False), (1, 0.5, True), (2, 1.0, False), (3, 1.5, True), (9, 2.0, True)]:
        expected = [0.5 * part for part in first.gradient(step)]
        other = second.gradient(step)
        assert (other is not None) == takes_turn
        if takes_turn:
            expected = [a + share * (0 if b is None else b) for a, b in zip(expected, other, strict=True)]
        for ours, theirs in zip(composed.gradient(step), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_two_guidance_scales_in_a_recipe_train_their_weighted_mean(registry):
    """The l2 optimum of two targets is their weighted mean, and guidance is linear in its scale."""
    config = recipe(registry, term("guidance", 1.0, w_min=2, w_max=2), term("guidance", 3.0, w_min=6, w_max=6))
    training = Training(registry, "recipe", config, family=GuidedFamily, total_steps=800, lr=0.1)
    training.steps(800, size=32)
    scale = (1.0 * 2 + 3.0 * 6) / 4
    t = SCHEDULE.grid(8).times[1:]
    a, b = affine_of("flow", SCHEDULE, t)
    student = training.networks.module("student")
    torch.testing.assert_close(student.a.detach()[2:], a, rtol=0, atol=2e-2)
    torch.testing.assert_close(student.b.detach()[2:], scale * b, rtol=0, atol=5e-2)
    assert (scale * b - 6 * b).abs().min() > 0.2, "a wrong mean would be seen"


# -- what passes through ----------------------------------------------------------------------------------------------


def updates_at(training, step):
    batch = gaussian_batch(step, 8, mean=0.6)
    return list(training.method.updates(training.context.at(step, batch.positions), batch, step))


def test_updates_of_other_roles_pass_through_in_order_and_unscaled(registry):
    config = recipe(registry, term("turns", 0.25), term("turns", 0.5, critic="other", value=2.0))
    training = Training(registry, "recipe", config)
    alone = Training(registry, "turns", config_of(registry, "turns"))
    assert [update.role for update in updates_at(training, 0)] == ["critic", "other"]
    found = updates_at(training, 1)
    assert [update.role for update in found] == ["critic", "other", "student", "critic", "other"]
    ours, theirs = found[0], updates_at(alone, 1)[0]
    assert ours.loss == theirs.loss
    assert torch.equal(ours.per_sample, theirs.per_sample)
    assert set(ours.metrics) == {"turns/seen"}
    joint = found[2]
    assert joint.t is None, "a sum of losses has no time"
    shares = joint.metrics
    assert joint.loss == 0.25 * shares["turns/loss"] + 0.5 * shares["turns-2/loss"]
    torch.testing.assert_close(joint.per_sample.mean(), joint.loss.detach())
    assert shares["turns-2/weight"] == 0.5


def test_where_one_term_contributes_its_times_are_kept(registry):
    training = Training(registry, "recipe", recipe(registry, term("halves", 3.0), term("turns", {0: 0, 1: 1})))
    (update,) = [update for update in updates_at(training, 0) if update.role == "student"]
    assert update.t is not None
    torch.testing.assert_close(update.per_sample.mean(), update.loss.detach())


def test_a_term_of_weight_zero_is_not_computed(registry):
    config = recipe(registry, term("halves"), term("turns", {2: 0.0, 3: 1.0}))
    training = Training(registry, "recipe", config)
    before = training.weights("critic")
    calls = []
    predict = training.family.predict
    training.family.predict = lambda network, *a, **k: (calls.append(network), predict(network, *a, **k))[1]
    training.steps(3)
    assert {id(network) for network in calls} == {id(training.networks.module("student"))}
    assert all(torch.equal(p, q) for p, q in zip(before, training.weights("critic"), strict=True))
    training.loop.step(3, [gaussian_batch(3, 8, mean=0.6)])
    assert not all(torch.equal(p, q) for p, q in zip(before, training.weights("critic"), strict=True))


def test_a_term_whose_weight_is_always_zero_has_no_networks_and_no_requirements(registry):
    config = recipe(registry, term("halves"), term("turns", 0.0))
    found = registry.get("method", "recipe")
    assert [role.name for role in found.roles(config, FULL)] == ["teacher", "student"]
    other = recipe(registry, term("halves"), term("turns", 0.0, value=2.0), term("lcm", 0.0))
    assert not found.requires(other, FULL).guidance_embedding
    assert found.requires(recipe(registry, term("lcm", **LCM)), FULL).guidance_embedding


def test_requirements_are_the_union_of_the_terms(registry):
    found = registry.get("method", "recipe")
    needs = found.requires(recipe(registry, term("turns"), term("lcm", **LCM)), MethodSetup("lora"))
    assert needs.images
    assert needs.zero_dropout
    assert needs.finite_snr
    assert not needs.features


# -- stages, sampler, state -------------------------------------------------------------------------------------------


def test_stages_are_those_of_the_one_term_that_has_some(registry):
    found = registry.get("method", "recipe")
    config = recipe(registry, term("turns"), term("halves"))
    own = registry.get("method", "halves").stages(config.terms[1].settings, total_steps=11)
    assert list(found.stages(config, total_steps=11)) == own
    training = Training(registry, "recipe", config, total_steps=4)
    values = [training.method.updates(training.context.at(step, (0,)), one(), step) for step in (1, 2)]
    seen = [next(u.metrics for u in us if u.role == "student")["halves/loss"].item() for us in values]
    x_0 = [x0_at(training, step) for step in (1, 2)]
    assert seen == pytest.approx([(x_0[0] - 1.0) ** 2, (x_0[1] - 2.0) ** 2]), "the second stage's value is one more"
    both = recipe(registry, term("halves"), term("halves", value=2.0))
    with pytest.raises(UserError, match="halves and halves-2 .* stages of their own"):
        found.stages(both, total_steps=4)


def one():
    batch = gaussian_batch(0, 1, mean=0.6)
    return Batch(batch.latents, batch.cond, batch.keys, (0,))


def x0_at(training, step):
    batch = one()
    t = SCHEDULE.grid(4).times[2:3]
    eps = training.context.at(step, (0,)).rng.randn("noise", (1,)).double()
    x_t = SCHEDULE.add_noise(batch.latents, eps, t)
    with torch.no_grad():
        return training.context.predict("student", x_t, t, batch.cond).x0.item()


def test_weights_may_depend_on_the_stage(registry):
    config = recipe(registry, term("halves"), term("turns", 2.0, every=1, stage_weights={"first": 0.0, "second": 0.5}))
    training = Training(registry, "recipe", config, total_steps=4)
    weights = []
    for step in range(4):
        (update,) = [update for update in updates_at(training, step) if update.role == "student"]
        weights.append(update.metrics["turns/weight"].item() if "turns/weight" in update.metrics else 0.0)
    assert weights == [0.0, 0.0, 1.0, 1.0]
    misspelt = recipe(registry, term("halves"), term("turns", stage_weights={"secnd": 0.5}))
    with pytest.raises(UserError, match="(?s)'secnd'.*did you mean 'second'"):
        registry.get("method", "recipe").stages(misspelt, total_steps=4)


@pytest.mark.parametrize(
    ("terms", "step"),
    [
        ([term("turns", {0: 0, 5: 1})], 0),
        ([term("turns", {0: 1, 5: 0}), term("lcm", {0: 1, 7: 0})], 7),
        ([term("halves", stage_weights={"second": 0.0})], 5),
    ],
)
def test_a_step_at_which_all_weights_are_zero_is_refused(registry, terms, step):
    with pytest.raises(UserError, match=f"above 0 at step {step},"):
        registry.get("method", "recipe").stages(recipe(registry, *terms), total_steps=10)


def test_the_sampler_is_that_of_the_named_term(registry):
    def sampler(**settings):
        found = registry.get("method", "recipe")
        config = recipe(
            registry, term("turns"), term("lcm", **LCM), term("lcm", **{**LCM, "num_inference_steps": 2}), **settings
        )
        method = found(config, MethodSetup("lora"))
        return method.sampler(SCHEDULE), method

    assert sampler()[0].num_inference_steps == 7
    assert sampler(sampler="lcm")[0].num_inference_steps == 4
    assert sampler(sampler="lcm-2")[0].num_inference_steps == 2
    assert sampler(sampler="turns")[1].result_role() == "student"
    with pytest.raises(ValueError, match="turns, lcm, lcm-2.*did you mean 'lcm-2'"):
        sampler(sampler="lcm-3")


def test_a_full_lcm_in_a_recipe_exports_its_average(registry):
    found = registry.get("method", "recipe")
    config = recipe(registry, term("turns"), term("lcm", **LCM), sampler="lcm")
    assert found(config, FULL).result_role() == "target"


def test_each_terms_state_is_restored_to_that_term(registry):
    config = recipe(registry, term("turns"), term("turns", critic="other", every=3), term("halves"))
    training = Training(registry, "recipe", config)
    training.steps(4)
    state = training.method.state_dict()
    assert {key: value.item() for key, value in state.items()} == {"turns/steps": 4, "turns-2/steps": 4}
    fresh = registry.get("method", "recipe")(config, FULL)
    fresh.load_state_dict({"turns/steps": torch.tensor(4), "turns-2/steps": torch.tensor(9)})
    assert {key: value.item() for key, value in fresh.state_dict().items()} == {"turns/steps": 4, "turns-2/steps": 9}


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_terms_that_declare_a_network_differently_are_refused_by_name_and_field(registry):
    found = registry.get("method", "recipe")
    config = recipe(registry, term("halves"), term("turns", student_learning_rate=0.5))
    with pytest.raises(
        UserError, match="halves and turns .*'student': learning_rate is None for halves and 0.5 for turns"
    ):
        found.roles(config, FULL)
    told = recipe(registry, term("turns"), term("lcm", **LCM))
    with pytest.raises(UserError, match="guidance_embedding is False for turns and True for lcm"):
        found.roles(told, FULL)
    assert [role.name for role in found.roles(told, MethodSetup("lora"))] == ["teacher", "student", "critic"]


def test_two_terms_may_not_train_one_network_beside_the_student(registry):
    config = recipe(registry, term("turns"), term("turns", value=2.0))
    with pytest.raises(UserError, match="turns and turns-2 would both train 'critic'"):
        registry.get("method", "recipe").roles(config, FULL)


def findings(tmp_path, terms, *, raw=None, **settings):
    part = raw if raw is not None else {"terms": terms, **settings}
    pair = Pair(tmp_path, {"distillation_method": "recipe", "distillation_config": {"recipe": part}})
    pair.write()
    result = distill("config", "check", *pair.options(), "--plugin", str(PLUGIN))
    assert "Traceback" not in result.output
    return result.exit_code, said(result.stderr), str(pair.config_file)


RIGHT = {"method": "lcm", "config": {"w_min": 2.0, "w_max": 3.0}}


@pytest.mark.parametrize(
    ("bad", "key", "remedy"),
    [
        ({"method": "lmc"}, "terms.1.method = 'lmc'", "did you mean 'lcm'"),
        ({"method": "turns", "config": {"evrey": 2}}, "terms.1.config.evrey = 2", "did you mean 'every'"),
        ({"method": "turns", "config": {"every": 0}}, "terms.1.config.every = 0: must be a whole number", "at least 1"),
        ({"method": "turns", "config": {"every": "often"}}, "terms.1.config.every = 'often'", "a whole number"),
        ({"method": "lcm", "config": {"w_min": 9.0, "w_max": 3.0}}, "terms.1.config.w_min = 9.0", "lower w_min"),
        ({"method": "turns", "weight": -1}, "terms.1.weight = -1", "at least 0"),
        ({"method": "turns", "weight": {"0": 1, "5": -2}}, "terms.1.weight = {'0': 1, '5': -2}", "at least 0"),
        ({"method": "turns", "weight": {"soon": 1}}, "terms.1.weight = {'soon': 1}", "{step: number}"),
        ({"method": "turns", "weight": {}}, "terms.1.weight = {}", "{step: number}"),
        ({"method": "turns", "wieght": 1}, "terms.1.wieght = 1", "did you mean 'weight'"),
        ({"methd": "turns"}, "terms.1.methd = 'turns'", "did you mean 'method'"),
        ({"method": "turns", "config": 3}, "terms.1.config = 3", "an object"),
    ],
)  # fmt: skip
def test_errors_inside_a_term_are_reported_with_path_and_remedy(tmp_path, bad, key, remedy):
    code, text, file = findings(tmp_path, [RIGHT, bad])
    assert code == 2, text
    assert f"{file}: distillation_config.recipe.{key}" in text
    assert remedy in text


def test_all_terms_are_checked_in_one_go(tmp_path):
    code, text, _ = findings(tmp_path, [{"method": "lmc"}, {"method": "turns", "config": {"every": 0, "valeu": 1}}])
    assert code == 2
    assert "3 problems" in text, text


@pytest.mark.parametrize(
    ("part", "said_so"),
    [
        ({}, "recipe.terms = None: is required"),
        ({"terms": []}, "recipe.terms = []"),
        ({"terms": [{**RIGHT, "weight": 0}]}, "has no term with a weight above 0"),
        ({"terms": [RIGHT], "sampler": "lmc"}, "recipe.sampler = 'lmc': is none of the terms that are used: lcm (did"),
        ({"terms": [RIGHT], "weight": 3}, "recipe.weight = 3: is not a known key"),
        ({"terms": [{**RIGHT, "weight": {"0": 0, "3": 1}}]}, "no term of the recipe has a weight above 0 at step 0"),
        ({"terms": [{"method": "halves"}, {"method": "halves"}]}, "stages of their own"),
        ({"terms": [{"method": "turns"}, {"method": "turns"}]}, "would both train 'critic'"),
        ({"terms": [{"method": "lcm", "config": {"num_ddim_timesteps": 30}}, {"method": "turns"}]}, "usable"),
    ],
)  # fmt: skip
def test_errors_of_the_whole_recipe_are_refused_before_anything_loads(tmp_path, part, said_so):
    code, text, _ = findings(tmp_path, None, raw=part)
    assert code == (0 if said_so == "usable" else 2), text
    assert said_so in text


def test_grids_of_the_terms_are_compared_with_the_model_each_by_itself(registry, tmp_path):
    terms = [
        {"method": "lcm", "config": {"num_ddim_timesteps": 30}},
        {"method": "lcm", "config": {"num_ddim_timesteps": 40}},
    ]
    pair = Pair(tmp_path, {"distillation_method": "recipe", "distillation_config": {"recipe": {"terms": terms}}})
    pair.write()
    notices = load_configuration(registry, config_file=pair.config_file, data_file=pair.data_file).notices
    assert any(line.startswith("distillation_config.recipe.terms.0.config.num_ddim_timesteps = 30") for line in notices)
    assert not any("terms.1" in line for line in notices)


def test_an_alias_names_a_term_too(tmp_path):
    code, text, _ = findings(tmp_path, [{"method": "in-turns"}], sampler="in-turns")
    assert code == 0, text


def test_the_documented_recipe_is_usable(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    documented = json.loads(page.partition("```json\n")[2].partition("```")[0])
    pair = Pair(tmp_path, documented)
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 0, result.output


# -- from a configuration alone ---------------------------------------------------------------------------------------


def test_a_recipe_of_two_methods_trains_from_a_configuration_alone_and_resumes(tmp_path):
    terms = [
        {"method": "lcm", "config": {"w_min": 2.0, "w_max": 4.0}},
        {"method": "guidance", "weight": {"0": 0, "2": 0.5}, "config": {"w_min": 3.0, "w_max": 3.0}},
        {"method": "turns", "weight": 0.1, "config": {"every": 3}},
    ]
    settings = {
        "distillation_method": "recipe",
        "distillation_config": {"recipe": {"terms": terms, "sampler": "lcm"}},
        "plugins": [str(PLUGIN)],
        "validation_step_interval": 0,
        "checkpoint_step_interval": 3,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    write_tiny_sdxl(tmp_path / "model", layers_per_block=1)
    _, lines = execute(write_run(tmp_path, output="whole", max_train_steps=6, **settings))
    assert any("recipe: lcm weighs 1; guidance weighs 0 at step 0, 0.5 at step 2" in line for line in lines)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert ["guidance/loss" in row for row in rows] == [False, True, True, True, True, True]
    assert ["turns/loss" in row for row in rows] == [False, False, True, False, False, True]
    for row in rows:
        parts = [
            row[f"{name}/weight"] * row[f"{name}/loss"]
            for name in ("lcm", "guidance", "turns")
            if f"{name}/loss" in row
        ]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert "critic/loss" in rows[0]

    execute(write_run(tmp_path, output="parts", max_train_steps=3, **settings))
    execute(write_run(tmp_path, output="parts", max_train_steps=6, **settings))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    resolved = json.loads((tmp_path / "whole" / "config.resolved.json").read_text())
    assert resolved["distillation_config"]["recipe"]["terms"][0]["config"]["loss_type"] == "l2", "defaults are written"
    again = tmp_path / "again.json"
    again.write_text(json.dumps({**resolved, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": None}))
    execute(again)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
