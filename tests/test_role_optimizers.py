"""Each trained network has optimizer settings of its own; networks of different kinds stand beside each other."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.engine.networks import Networks
from distill.core.engine.observer import TrainingObserver
from distill.core.engine.signals import StopRequest
from distill.core.errors import ConfigError, UserError
from distill.core.plugin_api.family import LoraSettings, ModelSettings
from distill.core.plugin_api.method import Role
from distill.core.registry.registry import Registry
from distill.core.runs.components import RunComponents
from distill.core.runs.disk_plan import disk_plan
from distill.core.runs.memory_plan import memory_settings
from distill.core.runs.optimizers import of_role
from distill.core.runs.planned_memory import planned_memory
from distill.core.settings.run_settings import RunSettings
from distill.core.testing.trial import make_trial as shaken
from distill.core.utils.memory import savings
from distill.distill_methods.dmd2 import DMD2
from distill.distill_methods.tcd import TCD
from distill.model_families.sdxl import SDXL
from support.quickstart import command
from support.small_run import execute, write_run
from support.tiny_sdxl import write_tiny_sdxl
from support.trial import LORA, make_batch

REGISTRY = Registry.load(installed=False)
QUIET = {"validation_step_interval": 0, "report_to": "none", "evaluation_num_samples": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model", layers_per_block=1)


def configured(root, **settings):
    return load_configuration(REGISTRY, config_file=write_run(root, **QUIET, **settings))


def parts_of(configuration):
    return RunComponents(configuration, REGISTRY, StopRequest(), observer=TrainingObserver())


# -- whose settings they are ------------------------------------------------------------------------------------------


def test_the_optimizers_hold_the_papers_values_and_the_users_over_them(tmp_path):
    pcm = parts_of(configured(tmp_path, distillation_method="pcm", distillation_config={"pcm": {}}))
    made = {role: pcm._optimizer(role) for role in ("student", "discriminator")}
    groups = {role: each.optimizer.param_groups[0] for role, each in made.items()}
    assert (groups["student"]["betas"], groups["student"]["weight_decay"]) == ((0.9, 0.999), 1e-2)
    assert (groups["discriminator"]["betas"], groups["discriminator"]["weight_decay"]) == ((0.0, 0.999), 1e-3)
    assert made["discriminator"].learning_rate(5) == 1e-5
    assert made["student"].learning_rate(5) == 1e-3

    given = {"discriminator": {"adam_beta1": 0.5, "learning_rate": 3e-4}, "student": {"max_grad_norm": 7}}
    user = parts_of(configured(tmp_path, output="user", distillation_method="pcm", role_optimizers=given))
    heads, student = user._optimizer("discriminator"), user._optimizer("student")
    assert heads.optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert heads.optimizer.param_groups[0]["weight_decay"] == 1e-3  # still the paper's
    assert heads.learning_rate(5) == 3e-4
    assert (student._max_grad_norm, heads._max_grad_norm) == (7, 1)


def test_a_gradient_is_clipped_at_its_own_roles_norm(tmp_path):
    dmd2 = parts_of(configured(tmp_path, distillation_method="dmd2", max_grad_norm=0.5))
    moved = {}
    for role in ("student", "fake_score"):
        optimizer = dmd2._optimizer(role)
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        first = optimizer.parameters[0]
        first.grad.flatten()[0] = 100.0
        gradients = []
        optimizer.optimizer.step = lambda gradients=gradients, first=first: gradients.append(first.grad.norm().item())
        optimizer.step(0)
        moved[role] = gradients[0]
    assert moved == pytest.approx({"student": 0.5, "fake_score": 10.0}, rel=1e-5)


def test_the_nearest_setting_wins():
    role = Role("heads", trains="head", betas=(0.0, 0.99), weight_decay=0.0, max_grad_norm=0.0)
    adam = REGISTRY.get("optimizer", "adamw")
    run = RunSettings(learning_rate=1e-4, adam_epsilon=1e-6, max_grad_norm=1.0)
    found, norm = of_role(role, run, adam)
    assert (found.beta1, found.beta2, found.weight_decay, norm) == (0.0, 0.99, 0.0, 0.0)  # zeros are settings too
    assert (found.learning_rate, found.epsilon) == (1e-4, 1e-6)
    run = RunSettings(role_optimizers={"heads": {"adam_beta2": 0.5, "max_grad_norm": 3.0}})  # type: ignore[arg-type]
    found, norm = of_role(role, run, adam)
    assert (found.beta1, found.beta2, norm) == (0.0, 0.5, 3.0)
    finds_itself = SimpleNamespace(estimates_learning_rate=True)
    slow = Role("heads", trains="head", learning_rate=1e-5)
    assert of_role(slow, RunSettings(learning_rate=1.0), finds_itself)[0].learning_rate == 1.0  # type: ignore[arg-type]


# -- what is refused, and what is said --------------------------------------------------------------------------------


def refused(root, **settings):
    with pytest.raises(ConfigError) as caught:
        configured(root, **settings)
    return {finding.key: finding for finding in caught.value.findings}


def test_networks_that_are_not_there_are_refused_with_the_nearest_name(tmp_path):
    found = refused(
        tmp_path, distillation_method="dmd2", role_optimizers={"fake_scor": {"learning_rate": 1e-5}, "teacher": {}}
    )
    assert found["role_optimizers.fake_scor"].problem == "is no network that the method 'dmd2' trains here"
    assert found["role_optimizers.fake_scor"].remedy == "did you mean 'fake_score'? it trains: student, fake_score"
    assert found["role_optimizers.teacher"].remedy == "it trains: student, fake_score"
    assert set(found) == {"role_optimizers.fake_scor", "role_optimizers.teacher"}


def test_settings_that_are_not_there_or_not_honoured_are_refused(tmp_path):
    found = refused(tmp_path, distillation_method="pcm", role_optimizers={"discriminator": {"adam_beta3": 0.1}})
    assert "adam_beta" in found["role_optimizers.discriminator.adam_beta3"].remedy
    plugins = {name: REGISTRY.get("optimizer", name) for name in REGISTRY.names("optimizer")}
    without = next(name for name, plugin in plugins.items() if "adam_beta1" not in plugin.honours)
    student = {"adam_beta1": 0.5, "max_grad_norm": 2}
    found = refused(tmp_path, optimizer=without, role_optimizers={"student": student})
    problem = found["role_optimizers.student.adam_beta1"].problem
    assert problem == f"is not honoured: the optimizer {without!r} has no such setting"
    assert refused(tmp_path, role_optimizers={"student": {"adam_beta1": 1.5}}).keys() == {
        "role_optimizers.student.adam_beta1"
    }


def test_the_command_line_reaches_into_the_file(tmp_path):
    file = write_run(tmp_path, **QUIET, distillation_method="pcm", role_optimizers={"student": {"max_grad_norm": 7}})
    overrides = ["role_optimizers.discriminator.learning_rate=1e-4", "role_optimizers.discriminator.adam_beta1=0.5"]
    run = load_configuration(REGISTRY, config_file=file, overrides=overrides).run
    assert run.role_optimizers["student"].max_grad_norm == 7
    assert run.role_optimizers["discriminator"].model_dump(exclude_none=True) == {
        "learning_rate": 1e-4, "adam_beta1": 0.5,
    }  # fmt: skip


def test_a_methods_own_settings_are_said(tmp_path):
    notices = configured(tmp_path, distillation_method="pcm", distillation_config={"pcm": {}}).notices
    line = next(line for line in notices if line.startswith("discriminator is trained with"))
    assert "learning rate 1e-05, betas 0 and 0.999, weight decay 0.001: pcm's own" in line
    assert "role_optimizers.discriminator changes them" in line
    shown = command("plugins", "show", "pcm").out
    assert "heads on features, places, of all levels, learning rate 1e-05, betas 0 and 0.999" in shown
    assert "fake_score (lora, gradients clipped at 10)" in command("plugins", "show", "dmd2").out


def test_a_resumed_run_may_change_a_networks_rate_and_not_its_moments(tmp_path):
    pcm = {**QUIET, "distillation_method": "pcm", "distillation_config": {"pcm": {}}, "max_train_steps": 2}
    execute(write_run(tmp_path, **pcm))
    rates = {"discriminator": {"learning_rate": 1e-4, "max_grad_norm": 2}}
    execute(write_run(tmp_path, **{**pcm, "max_train_steps": 3}, role_optimizers=rates))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [row["discriminator/lr"] for row in rows] == [1e-5, 1e-5, 1e-4]
    moments = {"discriminator": {"adam_beta1": 0.5}}
    with pytest.raises(UserError, match=r"role_optimizers\.discriminator\.adam_beta1"):
        execute(write_run(tmp_path, **{**pcm, "max_train_steps": 4}, role_optimizers=moments))


# -- networks of different kinds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("student", "fake_score"), ("fake_score", "student")])
@pytest.mark.parametrize("kinds", [("lora", "full"), ("full", "lora")])
def test_an_adapter_and_a_full_copy_stand_beside_each_other_in_any_order(folder, order, kinds):
    family = SDXL(SDXL.Config(), ModelSettings(str(folder)))
    trains = dict(zip(("student", "fake_score"), kinds, strict=True))
    roles = [Role("teacher"), *(Role(name, trains=trains[name]) for name in order)]
    networks = Networks(family, roles, lora=LoraSettings(rank=4, alpha=4.0), seed=0)
    base = {name.replace(".base_layer", ""): value for name, value in networks.base.state_dict().items()}
    full, adapter = (next(name for name in trains if trains[name] == kind) for kind in ("full", "lora"))
    copied = dict(networks.module(full).named_parameters())
    assert not any("lora_" in name for name in copied)
    assert all(torch.equal(value, base[name]) and value.requires_grad for name, value in copied.items())
    assert all("lora_" in name for name in networks.named_parameters(adapter))
    assert list(networks.roles) == ["teacher", *order]


def mixed(folder, **config):
    family = SDXL(SDXL.Config(), ModelSettings(str(folder)))
    settings = {"fake_updates_per_student_update": 2, "num_inference_steps": 2, "fake_score": "full", **config}
    return shaken(
        family, DMD2, DMD2.Config(**settings), "lora", lora=LORA, watching=True,
        batch_of=lambda needs, step: make_batch(family, step, images=needs.images),
    )  # fmt: skip


def test_a_full_fake_score_learns_beside_a_lora_and_neither_moves_the_base(folder):
    trial = mixed(folder, gan_weight=0.1)
    roles = {name: role.trains for name, role in trial.networks.roles.items()}
    assert roles == {"teacher": "none", "student": "lora", "fake_score": "full", "discriminator": "head"}
    before = {role: [p.detach().clone() for p in trial.networks.parameters(role)] for role in trial.loop.optimizers}
    for step in range(2):
        trial.loop.step(step, [trial.batch(step)])
    for role, kept in before.items():
        assert any(not torch.equal(old, new) for old, new in zip(kept, trial.networks.parameters(role), strict=True))
    for name, value in trial.networks.base.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, trial.pristine[name])


def test_a_mixed_run_resumes_bit_for_bit_and_is_counted_by_the_plan(tmp_path):
    dmd2 = {"fake_updates_per_student_update": 2, "num_inference_steps": 2, "fake_score": "full", "gan_weight": 0.1}
    settings = {**QUIET, "distillation_method": "dmd2", "distillation_config": {"dmd2": dmd2}, "seed": 3}
    whole = write_run(tmp_path, output="whole", max_train_steps=6, checkpoint_step_interval=4, **settings)
    execute(whole)
    configuration = load_configuration(REGISTRY, config_file=whole)
    # the first four steps of it, in a folder of their own, then the rest from their checkpoint
    stopped = write_run(tmp_path, output="stopped", max_train_steps=6, checkpoint_step_interval=4, **settings)
    (tmp_path / "stopped").mkdir()
    for name in ("checkpoint-4", "config.resolved.json"):
        if (tmp_path / "whole" / name).exists():
            (tmp_path / "whole" / name).rename(tmp_path / "stopped" / name)
    _, lines = execute(stopped)
    assert any("4" in line and "checkpoint" in line for line in lines)
    rows = {
        output: {row["step"]: row for row in map(json.loads, (tmp_path / output / "metrics.jsonl").open())}
        for output in ("whole", "stopped")
    }
    for step in (5, 6):
        for key, value in rows["whole"][step].items():
            if "loss" in key or "norm" in key:
                assert rows["stopped"][step][key] == value, (step, key)
    states = [torch_state(tmp_path / output) for output in ("whole", "stopped")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    planned, run = planned_memory(configuration, REGISTRY), parts_of(configuration)
    held = memory_settings(run)
    assert planned is not None
    assert planned.trained_parameters == held.trained_parameters
    assert planned.student_parameters == held.student_parameters < planned.base_parameters
    assert planned.trained_parameters > planned.base_parameters
    assert not any("base_model_precision" in label for label, _ in savings(planned, quantizers=True))
    assert disk_plan(configuration.run, planned).student_bytes == 4 * held.student_parameters


def torch_state(output):
    from safetensors.torch import load_file

    files = sorted((output / "checkpoint-6").glob("*.safetensors"))
    assert files
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def test_adapters_keys_have_an_effect_beside_a_full_student(tmp_path):
    notices = configured(
        tmp_path, distillation_method="dmd2", model_type="full", distillation_config={"dmd2": {"fake_score": "lora"}}
    ).notices
    assert "lora_rank, lora_alpha: of the fake_score alone with model_type full" in notices


# -- averages of adapters ---------------------------------------------------------------------------------------------


def test_the_target_of_a_lora_can_be_its_average(folder):
    """theta- <- 0.95 theta- + 0.05 theta after each step, and it is what is exported."""
    family = SDXL(SDXL.Config(), ModelSettings(str(folder)))
    settings = {"num_ddim_timesteps": 4, "ema_target": True}
    trial = shaken(
        family, TCD, TCD.Config(**settings), "lora", lora=LORA,
        batch_of=lambda needs, step: make_batch(family, step, images=needs.images),
    )  # fmt: skip
    assert trial.method.result_role() == "target"
    expected = [p.detach().clone() for p in trial.networks.named_parameters("target").values()]
    for step in range(3):
        trial.loop.step(step, [trial.batch(step)])
        student = trial.networks.named_parameters("student").values()
        expected = [0.95 * old + 0.05 * new.detach() for old, new in zip(expected, student, strict=True)]
    for mine, average in zip(expected, trial.networks.named_parameters("target").values(), strict=True):
        torch.testing.assert_close(mine, average.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["lcm", "pcm", "tcd"])
@pytest.mark.parametrize(
    ("model_type", "asked", "averaged"),
    [("lora", None, False), ("lora", True, True), ("full", None, True), ("full", False, False)],
)
def test_which_targets_are_averages(method, model_type, asked, averaged):
    from distill.core.plugin_api.method import MethodSetup

    found, setup = REGISTRY.get("method", method), MethodSetup(model_type)
    config = found.Config(ema_target=asked)
    roles = {role.name: role for role in found.roles(config, setup)}
    assert ("target" in roles) == averaged
    assert found(config, setup).result_role() == ("target" if averaged else "student")
    if averaged:
        assert (roles["target"].ema_of, roles["target"].ema_decay) == ("student", 0.95)


def test_a_lora_with_an_averaged_target_is_exported_as_the_average(tmp_path):
    tcd = {"num_ddim_timesteps": 4, "ema_target": True, "num_inference_steps": 2}
    config = write_run(
        tmp_path, **QUIET, distillation_method="tcd", distillation_config={"tcd": tcd}, max_train_steps=3,
        export_online_weights=True, learning_rate=1e-2,
    )  # fmt: skip
    result, _ = execute(config)
    from safetensors.torch import load_file

    exported = load_file(result.student / "pytorch_lora_weights.safetensors")
    online = load_file(result.output_dir / "student-online" / "pytorch_lora_weights.safetensors")
    state = {}
    for file in (tmp_path / "out" / "checkpoint-3").glob("*.safetensors"):
        state |= {f"{file.stem}/{name}": value for name, value in load_file(file).items()}
    assert exported.keys() == online.keys()
    assert any(not torch.equal(exported[name], online[name]) for name in exported)
    targets = [value for name, value in state.items() if name.startswith("network-target") and "lora_B" in name]
    assert targets
    total = sum(value.double().abs().sum().item() for value in targets)
    ours = sum(value.double().abs().sum().item() for name, value in exported.items() if "lora_B" in name)
    assert ours == pytest.approx(total, rel=1e-6)


# -- the notice of dmd2 -----------------------------------------------------------------------------------------------


def test_dmd2_says_that_images_teach_nothing_without_the_adversarial_term(tmp_path):
    parts = parts_of(configured(tmp_path, distillation_method="dmd2"))
    assert any("gan_weight = 0" in line and "5e-3" in line for line in parts.method.notices())
    learns = configured(
        tmp_path, output="gan", distillation_method="dmd2", distillation_config={"dmd2": {"gan_weight": 0.005}}
    )
    assert not any("gan_weight = 0" in line for line in parts_of(learns).method.notices())
