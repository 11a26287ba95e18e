"""One TCD step on a random tiny SDXL against the formulas written out, and a staged run that is resumed."""

import json
import shutil

import numpy as np
import pytest
import torch
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.errors import UserError
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import LoraSettings, ModelSettings
from distill.core.plugin_api.method import MethodSetup
from distill.core.plugin_api.stage import Stage
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.tcd import TCD
from distill.model_families.sdxl import SDXL
from safetensors.torch import load_file
from support.quickstart import command
from support.sdxl_setup import make_batch, split
from support.small_run import execute, losses, write_run
from support.tiny_sdxl import write_tiny_sdxl

STAGES = (Stage("4 segments", 5), Stage("2 segments", 5))
SETTINGS = {"segments": [4, 2], "adversarial_weight": [0.0, 0.5], "w_min": 2.0, "w_max": 6.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers_per_block=1)


def setup(folder, model_type, **settings):
    """(family, method, networks, context) in float64, every network different from the teacher."""
    family = SDXL(SDXL.Config(), ModelSettings(str(folder)))
    method = TCD(TCD.Config(**{**SETTINGS, **settings}), MethodSetup(model_type))
    lora = LoraSettings(rank=4, alpha=8.0) if model_type == "lora" else None
    roles = method.roles(method.config, method.setup)
    networks = Networks(family, roles, lora=lora, seed=0, parameter_dtype=torch.float64)
    networks.base.double()
    g = torch.Generator().manual_seed(5)
    for name, parameter in networks.named_parameters("student").items():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=g))
        elif model_type == "full":
            parameter.data.mul_(1.01)
    return family, method, networks, Context(Runtime(family, networks, 0, torch.device("cpu"), stages=STAGES))


def written_out(family, networks, context, batch, *, model_type, step, num_segments, config):
    """The losses of student and discriminator from alphas_cumprod alone, without the helpers of method and core."""
    betas = torch.from_numpy(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    bar = torch.cumprod(1 - betas, 0)
    x_0, n, rng = batch.latents, len(batch), RngStreams(0, step, batch.positions)
    i, share = rng.integers("index", 50).tolist(), rng.uniform("target").tolist()
    edge = [max(e for e in [-(-b * 50 // num_segments) for b in range(num_segments)] if e <= index) for index in i]
    j = [e + int(u * (index - e + 1)) for index, e, u in zip(i, edge, share, strict=True)]
    further = rng.integers("further", -(-50 // num_segments)).tolist()
    points = [0, *range(19, 1000, 20)]
    t, t_prev, s = (torch.tensor([points[p + up] for p in at]) for at, up in ((i, 1), (i, 0), (j, 0)))
    u = torch.tensor([points[min(p + more, 49)] for p, more in zip(j, further, strict=True)])
    g = rng.uniform("w", config.w_min, config.w_max)

    def a(time):
        return bar[time].sqrt().reshape(n, 1, 1, 1)

    def b(time):
        return (1 - bar[time]).sqrt().reshape(n, 1, 1, 1)

    def network(role, x, time, *, prompt=True, w=None):
        c, keep = batch.cond, float(prompt)
        added = {"text_embeds": keep * c["pooled_prompt_embeds"], "time_ids": c["time_ids"]}
        extra = {}
        if w is not None:
            angle = 1000.0 * w[:, None] * torch.exp(torch.arange(128).double() * -(np.log(10000.0) / 127))[None]
            extra = {"timestep_cond": torch.cat([angle.sin(), angle.cos()], 1)}
        with networks.use(role) as unet:
            return unet(
                x, time, encoder_hidden_states=keep * c["prompt_embeds"], added_cond_kwargs=added, **extra
            ).sample

    def ddim_step(x, eps, start, end):
        return a(end) * (x - b(start) * eps) / a(start) + b(end) * eps

    x_t = a(t) * x_0 + b(t) * rng.randn("noise", x_0.shape[1:]).double()
    w = g - 1 if model_type == "full" else None
    with torch.no_grad():
        cond, uncond = (network("teacher", x_t, t, prompt=flag) for flag in (True, False))
        x_prev = ddim_step(x_t, uncond + g.reshape(n, 1, 1, 1) * (cond - uncond), t, t_prev)
        role = "student" if model_type == "lora" else "target"
        target = ddim_step(x_prev, network(role, x_prev, t_prev, w=w), t_prev, s)
    output = ddim_step(x_t, network("student", x_t, t, w=w), t, s)
    consistency = ((output - target) ** 2).mean()

    kept, noise = a(u) / a(s), rng.randn("renoise", x_0.shape[1:]).double()
    added = (1 - bar[u].reshape(n, 1, 1, 1) / bar[s].reshape(n, 1, 1, 1)).clamp(min=0).sqrt() * noise

    def judged(x):
        return context.logits("discriminator", context.features("teacher", kept * x + added, u, batch.cond))

    def hinge(logits, sign):  # of all places of a level, then of all levels
        return torch.stack([torch.relu(1 - sign * level).mean() for level in logits]).mean()

    student = consistency + 0.5 * hinge(judged(output), 1)
    return consistency, student, hinge(judged(target), 1) + hinge(judged(output.detach()), -1)


def gradients(loss, networks, role):
    return torch.autograd.grad(loss, networks.parameters(role), allow_unused=True)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_one_step_equals_the_papers_algorithm(folder, model_type):
    family, method, networks, context = setup(folder, model_type)
    batch = make_batch(family)
    for step, num_segments in [(1, 4), (7, 2)]:
        at = context.at(step, batch.positions)
        found = list(method.updates(at, batch, step))
        consistency, student, told = written_out(
            family, networks, at, batch, model_type=model_type, step=step, num_segments=num_segments,
            config=method.config,
        )  # fmt: skip
        expected = [("student", student), ("discriminator", told)] if num_segments == 2 else [("student", consistency)]
        assert [update.role for update in found] == [role for role, _ in expected]
        for update, (role, loss) in zip(found, expected, strict=True):
            assert update.loss.item() == pytest.approx(loss.item(), rel=1e-6)  # logits are float32
            ours, theirs = gradients(update.loss, networks, role), gradients(loss, networks, role)
            assert any(gradient is not None and gradient.any() for gradient in ours)
            for one, other in zip(ours, theirs, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_both_guidance_conventions_give_the_same_huber_loss(folder):
    results = []
    for convention, low, high in [("scale", 2.0, 6.0), ("paper", 1.0, 5.0)]:
        family, method, _, context = setup(
            folder, "lora", guidance_convention=convention, w_min=low, w_max=high, loss_type="huber"
        )
        batch = make_batch(family)
        (update,) = method.updates(context.at(0, batch.positions), batch, 0)
        results.append(update.loss.item())
    assert results[0] == pytest.approx(results[1], rel=1e-12)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_four_micro_batches_of_one_equal_one_batch_of_four_and_the_teacher_is_unchanged(folder, model_type):
    weights = []
    for parts in (1, 4):
        family, method, networks, context = setup(folder, model_type)
        trained = {id(p) for role in networks.trained_roles() for p in networks.parameters(role)}
        frozen = {n: p for n, p in networks.base.named_parameters() if id(p) not in trained}
        before = {n: p.clone() for n, p in frozen.items()}
        optimizers = {}
        for role in networks.trained_roles():
            parameters = networks.parameters(role)
            sgd = torch.optim.SGD(parameters, lr=1e-3)
            optimizers[role] = RoleOptimizer(
                sgd, parameters, learning_rate=1e-3, schedule=lambda step: 1.0, max_grad_norm=1.0
            )
        loop = Loop(method, context, networks, optimizers, health=HealthMonitor(3), stages=STAGES)
        for step in (4, 5, 6):
            loop.step(step, split(make_batch(family, seed=step), parts))
        assert frozen
        assert all(torch.equal(p, before[n]) for n, p in frozen.items())
        weights.append([p.clone() for role in ("student", "discriminator") for p in networks.parameters(role)])
    for one, four in zip(*weights, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-7)


# -- whole runs -------------------------------------------------------------------------------------------------------


def staged_run(root, **settings):
    tcd = {"segments": [4, 2, 1], "adversarial_weight": [0, 0.1, 0.2], "consistency_weight": [1, 0.5, 0.5]}
    own = {
        "distillation_method": "tcd",
        "distillation_config": {"tcd": {**tcd, "reset_optimizer": True, "num_inference_steps": 2}},
        "max_train_steps": 7,
        "validation_step_interval": 0,
        "checkpoint_step_interval": 1,
        "checkpoints_total_limit": 20,
    }
    return write_run(root, **{**own, **settings})


def tensors(output):
    files = sorted((output / "student").rglob("*.safetensors"))
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize(("model_type", "kept"), [("lora", 2), ("full", 4)])
def test_resumed_at_and_before_a_boundary_of_stages_is_bit_for_bit_the_same(tmp_path, model_type, kept):
    """Stages begin at steps 2 and 5, counted from 0."""
    config = staged_run(tmp_path, model_type=model_type)
    execute(config)
    output = tmp_path / "out"
    whole, weights = losses(output), tensors(output)
    assert weights
    scheduler = json.loads((output / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["original_inference_steps"]) == ("TCDScheduler", 50)
    assert "eta=0.3" in (output / "student" / "README.md").read_text()
    for checkpoint in output.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > kept:
            shutil.rmtree(checkpoint)
    shutil.rmtree(output / "student")
    _, said = execute(config)
    assert any("resumed" in line and str(kept) in line for line in said), said
    assert losses(output) == whole
    again = tensors(output)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_stages_without_steps_and_wrong_settings_exit_with_code_2(tmp_path):
    with pytest.raises(UserError, match=r"tcd\.segments: 2 optimizer steps leave stage 2 of 3 without any"):
        execute(staged_run(tmp_path, max_train_steps=2))
    wrong = {"tcd": {"segments": [1, 8], "eta": 3, "adversarial_weight": "much"}}
    file = staged_run(tmp_path, distillation_config=wrong)
    said = command("config", "check", "--config", str(file))
    assert said.code == 2
    for key in ("distillation_config.tcd.eta", "distillation_config.tcd.adversarial_weight"):
        assert key in said.out + said.err
    settings = json.loads(file.read_text())
    settings["distillation_config"] = {"tcd": {"segments": [1, 8]}}
    file.write_text(json.dumps(settings))
    said = command("config", "check", "--config", str(file))
    assert said.code == 2
    assert "must fall from stage to stage" in said.out + said.err
