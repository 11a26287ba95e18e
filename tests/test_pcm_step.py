"""One PCM step on a random tiny SDXL against the paper's formulas written out, and what a step promises."""

import numpy as np
import pytest
import torch
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import LoraSettings, ModelSettings
from distill.core.plugin_api.method import MethodSetup
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.pcm import PCM
from distill.model_families.sdxl import SDXL
from support.sdxl_setup import make_batch, split
from support.tiny_sdxl import write_tiny_sdxl

N, M = 40, 4
ROLES = ("student", "discriminator")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers_per_block=1)


def make_setup(folder, *, model_type="lora", checkpointing=False, **config):
    """(family, method, networks, context), student, target and teacher all different."""
    family = SDXL(SDXL.Config(), ModelSettings(str(folder)))
    method = PCM(PCM.Config(**config), MethodSetup(model_type))
    lora = LoraSettings(rank=4, alpha=8.0) if model_type == "lora" else None
    networks = Networks(
        family, method.roles(method.config, method.setup), lora=lora, seed=0, gradient_checkpointing=checkpointing,
        parameter_dtype=torch.float64,
    )  # fmt: skip
    networks.base.to(torch.float64)
    g = torch.Generator().manual_seed(5)
    for name, parameter in networks.named_parameters("student").items():
        if model_type == "full":
            parameter.data.mul_(1.01)
        elif "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=g))
    return family, method, networks, Context(Runtime(family, networks, seed=0, device=torch.device("cpu")))


def papers_losses(family, networks, batch, *, step, config, model_type):
    """Student's and heads' losses of arXiv 2405.18407 from the table of betas, with none of the diffusion core."""
    betas = torch.from_numpy(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    bar = torch.cumprod(1 - betas, 0)
    x0, n = batch.latents, len(batch)
    rng = RngStreams(0, step, batch.positions)
    shaped = lambda v: v.reshape(n, 1, 1, 1)  # noqa: E731
    at = lambda t: (shaped(bar[t].sqrt()), shaped((1 - bar[t]).sqrt()))  # noqa: E731
    i = rng.integers("index", N)
    t = (i + 1) * (1000 // N) - 1
    t_prev = (t - 1000 // N).clamp(min=0)
    inner = torch.from_numpy(np.floor(np.linspace(0, N, num=M, endpoint=False)).astype(np.int64))
    edge = torch.stack([inner[inner <= k].max() for k in i])  # the authors' edges
    s = ((edge + 1) * (1000 // N) - 1 - 1000 // N).clamp(min=0)
    top = (edge + N // M) * (1000 // N) - 1
    (a, sg), (a_, sg_), (a_s, sg_s) = at(t), at(t_prev), at(s)
    x_t = a * x0 + sg * rng.randn("noise", x0.shape[1:]).double()

    cond = dict(batch.cond)
    share = 0.0 if not config.cfg_free else 0.1 if config.empty_prompt_share is None else config.empty_prompt_share
    empty = rng.uniform("empty") < share
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        cond[name] = torch.where(empty.reshape(-1, *[1] * (cond[name].ndim - 1)), 0.0, cond[name])

    def call(role, x, time, *, prompt=True):
        own = {k: v if prompt or k == "time_ids" else torch.zeros_like(v) for k, v in cond.items()}
        added = {"text_embeds": own["pooled_prompt_embeds"], "time_ids": own["time_ids"]}
        with networks.use(role) as module:
            return module(x, time, encoder_hidden_states=own["prompt_embeds"], added_cond_kwargs=added).sample

    def to_edge(role, x, time, a, sg):
        e = call(role, x, time)
        return a_s * (x - sg * e) / a + sg_s * e

    with torch.no_grad():
        e = call("teacher", x_t, t)
        if not config.cfg_free:
            g = shaped(rng.uniform("w", config.w_min, config.w_max))
            e_u = call("teacher", x_t, t, prompt=False)
            e = e_u + g * (e - e_u)
        x_prev = a_ * (x_t - sg * e) / a + sg_ * e
        target = to_edge("student" if model_type == "lora" else "target", x_prev, t_prev, a_, sg_)
        target = torch.where(shaped(i == edge), x_prev, target)
    prediction = to_edge("student", x_t, t, a, sg)
    loss = (((prediction - target) ** 2 + config.huber_c**2).sqrt() - config.huber_c).mean()
    if not config.adversarial_weight:
        return loss, None

    u = s + (rng.uniform("further") * (top - s)).floor().long()
    ratio = shaped((bar[u] / bar[s]).sqrt())

    def judged(x_s, name):
        eps = rng.randn(f"further/{name}", x0.shape[1:]).double()
        x_u = ratio * x_s + (1 - ratio**2).sqrt() * eps  # add_noise from s to u of a variance-preserving process
        with networks.use("teacher") as module:
            return networks.module("discriminator")(family.features(module, x_u, u, cond))

    def hinge(logits, sign):  # of all places of a level, then of all levels
        return torch.stack([(1 - sign * level).clamp(min=0).mean() for level in logits]).mean()

    student = loss + config.adversarial_weight * hinge(judged(prediction, "fake"), 1)
    heads = hinge(judged(target, "real"), 1) + hinge(judged(prediction.detach(), "fake"), -1)
    return student, heads


CASES = {
    "guided": {},
    "unguided": {"cfg_free": True, "empty_prompt_share": 0.5},
    "plain": {"adversarial_weight": 0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_one_step_equals_the_papers_algorithm(folder, model_type, case):
    family, method, networks, context = make_setup(folder, model_type=model_type, **CASES[case])
    batch = make_batch(family, size=6)
    expected = papers_losses(family, networks, batch, step=3, config=method.config, model_type=model_type)
    updates = list(method.updates(context.at(3, batch.positions), batch, 3))
    assert [update.role for update in updates] == list(ROLES)[: 1 if case == "plain" else 2]
    for update, loss in zip(updates, expected, strict=False):
        assert update.loss.item() == pytest.approx(loss.item(), rel=1e-10)
        parameters = networks.parameters(update.role)
        ours = torch.autograd.grad(update.loss, parameters, retain_graph=True)
        theirs = torch.autograd.grad(loss, parameters, retain_graph=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-12)


def make_loop(method, networks, context, *, rates=None):
    """SGD, so that no update is zero only for its size."""
    optimizers = {}
    for role in networks.trained_roles():
        parameters, rate = networks.parameters(role), (rates or {}).get(role, 1e-2)
        sgd = torch.optim.SGD(parameters, lr=rate)
        optimizers[role] = RoleOptimizer(
            sgd, parameters, learning_rate=rate, schedule=lambda step: 1.0, max_grad_norm=0
        )
    return Loop(method, context, networks, optimizers, health=HealthMonitor(3))


def weights_of(networks):
    """Every weight there is, by role; the teacher's are those of the base that no role trains."""
    found = {role: list(networks.named_parameters(role).values()) for role in networks.roles if role != "teacher"}
    owned = {id(p) for weights in found.values() for p in weights}
    found["teacher"] = [p for p in networks.base.state_dict(keep_vars=True).values() if id(p) not in owned]
    return found


@pytest.mark.parametrize("model_type", ["lora", "full"])
@pytest.mark.parametrize("moving", ROLES)
def test_an_update_moves_its_own_role_alone(folder, model_type, moving):
    family, method, networks, context = make_setup(folder, model_type=model_type)
    flags = {name: p.requires_grad for name, p in networks.base.named_parameters()}
    before = {role: [p.clone() for p in weights] for role, weights in weights_of(networks).items()}
    loop = make_loop(method, networks, context, rates={role: 1e-2 if role == moving else 0.0 for role in ROLES})
    for step in range(2):
        loop.step(step, [make_batch(family, seed=step)])
    for role, weights in weights_of(networks).items():
        same = [torch.equal(p, q) for p, q in zip(weights, before[role], strict=True)]
        assert same
        if role != "target":  # which follows the student
            assert all(same) == (role != moving), role
    assert {name: p.requires_grad for name, p in networks.base.named_parameters()} == flags


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_four_micro_batches_of_one_equal_one_batch_of_four(folder, model_type):
    found = []
    for parts in (1, 4):
        family, method, networks, context = make_setup(folder, model_type=model_type)
        loop = make_loop(method, networks, context)
        for step in range(2):
            loop.step(step, split(make_batch(family, seed=step), parts))
        found.append([p.clone() for role in ROLES for p in networks.parameters(role)])
    for one, four in zip(*found, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-6, atol=1e-8)


def test_gradient_checkpointing_changes_no_gradient(folder):
    found = []
    for checkpointing in (False, True):
        family, method, networks, context = make_setup(folder, checkpointing=checkpointing)
        batch = make_batch(family)
        student, heads = method.updates(context.at(0, batch.positions), batch, 0)
        found.append(
            [
                *torch.autograd.grad(student.loss, networks.parameters("student")),
                *torch.autograd.grad(heads.loss, networks.parameters("discriminator")),
            ]
        )
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-9, atol=1e-13)


def test_the_adversarial_term_follows_its_weight(folder):
    """Off at weight 0, no heads asked for; the consistency loss beside it is the same."""
    found = []
    for weight in (0.0, {"0": 0.0, "2": 0.5}):
        family, method, networks, context = make_setup(folder, adversarial_weight=weight)
        batch = make_batch(family)
        found.append([list(method.updates(context.at(step, batch.positions), batch, step)) for step in (0, 2)])
    assert [len(updates) for updates in [*found[0], *found[1]]] == [1, 1, 1, 2]
    plain, weighed = found[0][1][0], found[1][1][0]
    expected = plain.loss + 0.5 * weighed.metrics["adversarial"]
    torch.testing.assert_close(weighed.loss, expected)
    torch.testing.assert_close(weighed.metrics["consistency"], plain.loss.detach())
