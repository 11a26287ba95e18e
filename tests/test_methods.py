"""What every registered method promises, on a random tiny SDXL in float64, as a LoRA and in full.

A method that is registered is here by itself, with its defaults; ``support/cases.py`` makes some cheaper and adds
variants. What a method refuses is said in the summary of warnings, with its reason.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from distill.core.config.requirements import check_requirements
from distill.core.diffusion import FlowSchedule
from distill.core.plugin_api.family import ExportInfo
from distill.core.plugin_api.method import MethodSetup
from distill.core.settings.run_settings import RunSettings
from distill.core.testing.trial import base_weights, own_weights, same
from distill.model_families.sdxl import SDXL
from support.cases import SETTINGS, config_of, found_of, refusal, registry
from support.config_files import distill, said
from support.tiny_sdxl import EDGE, write_tiny_sdxl
from support.trial import LORA, held_bytes, make_trial

STEPS, HALF = 4, 2
"""Optimizer steps of a trial, and where it is stopped and resumed: inside the second stage of methods with two."""
EVERY = [(case, kind) for case in sorted({*registry().names("method"), *SETTINGS}) for kind in ("lora", "full")]
CELLS = [cell for cell in EVERY if refusal(*cell) is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("methods") / "tiny", seed=0, layers_per_block=1)


@pytest.fixture(scope="module", params=CELLS, ids="-".join)
def cell(request):
    return request.param


def make(folder, cell, **settings):
    case, model_type = cell
    return make_trial(folder, found_of(case), config_of(case), model_type, total_steps=STEPS, **settings)


@pytest.fixture(scope="module")
def trained(cell, folder, tmp_path_factory):
    """A trial of four steps, every update watched, with a checkpoint on its way."""
    trial = make(folder, cell, watching=True)
    start = own_weights(trial.networks)
    trial.run(0, HALF)
    trainer = trial.trainer(tmp_path_factory.mktemp("run"))
    trainer.step = HALF
    trainer.save()
    trial.run(HALF, STEPS)
    return SimpleNamespace(trial=trial, start=start, folder=trainer.store.output_dir)


def test_gradients_are_finite_and_every_trained_role_moves(trained):
    trial = trained.trial
    assert {taken.role for taken in trial.loop.taken} == set(trial.networks.trained_roles())
    for taken in trial.loop.taken:
        gradients = [gradient for gradient in taken.gradients if gradient is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients), taken.role
        assert sum(gradient.square().sum() for gradient in gradients) > 0, taken.role
    now = own_weights(trial.networks)
    assert all(not same(trained.start[role], now[role]) for role in trial.networks.trained_roles())


def test_an_update_moves_its_own_role_and_that_roles_averages_alone(trained):
    roles = trained.trial.networks.roles
    for taken in trained.trial.loop.taken:
        followers = {name for name, role in roles.items() if role.ema_of == taken.role}
        assert taken.moved == {taken.role, *followers}
    assert trained.trial.loop.taken


def test_the_teacher_is_bitwise_unchanged_and_is_the_network_without_adapters(trained):
    trial = trained.trial
    now = base_weights(trial.networks)
    assert set(now) == set(trial.pristine)
    assert all(torch.equal(now[name], tensor) for name, tensor in trial.pristine.items())
    batch = trial.batch(0)
    x_t, t = torch.randn(4, *batch.latent_shape).double(), torch.tensor([999, 499, 19, 0])
    alone = type(trial.family)(trial.family.config, trial.family.settings).load_network().double()
    with torch.no_grad():
        expected = trial.family.predict(alone, x_t, trial.context.schedule.network_time(t), batch.cond)
        assert torch.equal(trial.context.predict("teacher", x_t, t, batch.cond).output, expected)


def test_four_micro_batches_of_one_train_as_one_of_four(cell, folder, trained):
    parts = make(folder, cell)
    parts.run(0, STEPS, parts=4)
    whole = trained.trial
    assert [taken.role for taken in parts.loop.taken] == [taken.role for taken in whole.loop.taken]
    for ours, theirs in zip(parts.loop.taken, whole.loop.taken, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6), ours.role
    ours, theirs = own_weights(parts.networks), own_weights(whole.networks)
    for role in ours:
        for p, q in zip(ours[role], theirs[role], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_method_resumed_from_a_checkpoint_trains_bit_for_bit_the_same(cell, folder, trained):
    fresh = make(folder, cell)
    trainer = fresh.trainer(trained.folder)
    trainer.resume(trainer.store.latest())
    assert trainer.step == HALF
    fresh.run(HALF, STEPS)
    later = trained.trial.loop.taken[-len(fresh.loop.taken) :]
    assert [(taken.role, taken.loss) for taken in fresh.loop.taken] == [(taken.role, taken.loss) for taken in later]
    ours, theirs = own_weights(fresh.networks), own_weights(trained.trial.networks)
    assert all(same(ours[role], theirs[role]) for role in ours)
    state, other = fresh.method.state_dict(), trained.trial.method.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_gradient_checkpointing_changes_no_gradient(cell, folder, trained):
    """Whatever adapters a backward pass crosses, each recomputation runs with those of its forward pass."""
    recomputed = make(folder, cell, checkpointing=True)
    recomputed.run(0, HALF)
    for ours, theirs in zip(recomputed.loop.taken, trained.trial.loop.taken, strict=False):
        assert ours.role == theirs.role
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-7)
        scale = max(float(gradient.abs().max()) for gradient in theirs.gradients if gradient is not None)
        for one, other in zip(ours.gradients, theirs.gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7 * scale)


def test_a_lora_holds_one_base(cell, trained):
    networks = trained.trial.networks
    bare = held_bytes(SimpleNamespace(roles={}, base=trained.trial.family.load_network().double()))  # type: ignore[arg-type]
    own = {role: sum(p.untyped_storage().nbytes() for p in weights) for role, weights in own_weights(networks).items()}
    assert held_bytes(networks) == bare + sum(own.values())
    if cell[1] == "lora":
        assert all(networks.module(role) is networks.base for role in networks.roles if _is_network(networks, role))
        assert sum(own.values()) < bare
    assert not own["teacher"]


def _is_network(networks, role):
    return networks.roles[role].trains != "head" and not networks.roles[role].auxiliary


def test_its_sampler_makes_images_and_the_exported_student_the_same(cell, trained, tmp_path):
    trial, role = trained.trial, trained.trial.method.result_role()
    family, networks = trial.family, trial.networks
    for module in {id(networks.module(name)): networks.module(name) for name in networks.roles}.values():
        module.float()
    sampler = trial.method.sampler(family.schedule, num_inference_steps=2)
    embeds = family.encode_prompts(["a red fox", "two boats"])
    ask = {"sampler": sampler, "seeds": [1, 2], "width": EDGE, "height": EDGE}
    with networks.use(role) as network:
        images = family.generate(network, embeds, **ask)
        info = ExportInfo(sampler, cell[1], LORA if cell[1] == "lora" else None, adapter=role)
        family.export(network, tmp_path / "student", info)
    with networks.use("teacher") as network:
        teachers = family.generate(network, embeds, **{**ask, "sampler": None, "num_inference_steps": 2})
    assert images.shape == (2, 3, EDGE, EDGE)
    assert images.isfinite().all()
    assert (images - teachers).abs().max() > 1e-3
    loaded = family.load_student(tmp_path / "student")
    torch.testing.assert_close(family.generate(loaded, embeds, **ask), images, rtol=0, atol=1e-5)


def test_the_family_can_do_what_it_needs(cell):
    case, model_type = cell
    findings, _ = check_requirements(found_of(case), config_of(case), SDXL, RunSettings(model_type=model_type))
    assert not findings


# -- without training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry().names("method"))
def test_plugins_show_prints_description_settings_and_needs(name):
    result = distill("plugins", "show", f"method.{name}")
    assert result.exit_code == 0, result.output
    found, text = found_of(name), said(result.stdout)
    assert said(found.__doc__) in text
    for key, info in found.Config.model_fields.items():
        assert f"{key}: " in text
        assert said(info.description) in text
    if any(info.is_required() for info in found.Config.model_fields.values()):
        assert f"needs: {said(found.requires.__doc__)}" in text
        return
    for model_type in ("lora", "full"):
        refused = refusal(name, model_type)
        if refused:
            assert f"model_type {model_type}: not possible: {said(refused.message)}" in text
            continue
        needs = found.requires(found.Config(), MethodSetup(model_type))
        own = text.partition(f"model_type {model_type}: ")[2].partition("model_type")[0]
        assert own.startswith("images with captions" if needs.images else "captions alone, no images")
        assert ("distillation cache" in own) == (needs.trajectory_points > 0)
        assert ("second time" in own.partition("networks:")[0]) == needs.second_time
        assert ("features from inside" in own) == needs.features
        assert ("guidance scale as an input" in own) == needs.guidance_embedding
        for role in found.roles(found.Config(), MethodSetup(model_type)):
            assert f"{role.name} (" in own


@pytest.mark.parametrize("name", ["lcm", "tcd", "guidance", "progressive", "meanflow"])
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_only_a_full_student_of_a_range_takes_the_guidance(name, model_type):
    found = found_of(name)
    for high, told in ((3.0, False), (5.0, model_type == "full")):
        config, setup = found.Config(w_min=3.0, w_max=high), MethodSetup(model_type)
        assert found.requires(config, setup).guidance_embedding == told
        assert any(role.guidance_embedding for role in found.roles(config, setup)) == told
        sampler = found(config, setup).sampler(FlowSchedule(), num_inference_steps=4)
        assert sampler.guidance_scale == (4.0 if told else 0.0)


def test_refused_combinations_have_a_reason():
    for case, model_type in EVERY:
        refused = refusal(case, model_type)
        if refused is not None:
            assert refused.remedy
            warnings.warn(f"{case} refuses model_type {model_type}: {refused.message}", stacklevel=1)
    assert {case.partition("/")[0] for case, _ in CELLS} == set(registry().names("method")), "each can do one of them"


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_the_roles_are_in_order(cell):
    """Teacher and student are there, sources come before what is made of them, and only heads need features."""
    case, model_type = cell
    setup = MethodSetup(model_type)
    roles = found_of(case).roles(config_of(case), setup)
    needs = found_of(case).requires(config_of(case), setup)
    names = [role.name for role in roles]
    assert {"teacher", "student"} <= set(names)
    assert len(set(names)) == len(names)
    for role in roles:
        assert role.source is None or role.source in names[: names.index(role.name)]
        assert role.trains in ("none", "head", model_type)
        assert role.trains == "none" or role.source is None
    assert any(role.guidance_embedding for role in roles) == needs.guidance_embedding
    assert any(role.second_time for role in roles) == needs.second_time
    assert needs.features or not any(role.trains == "head" for role in roles)
    stages = found_of(case).stages(config_of(case), total_steps=101)
    assert sum(stage.num_steps for stage in stages) == 101
    assert all(role in names for stage in stages for role in [*stage.copy, *stage.copy.values(), *stage.reset])
