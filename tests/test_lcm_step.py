"""One LCM step on a random tiny SDXL against the paper's formulas written out, and what a step promises."""

import numpy as np
import pytest
import torch
from distill.core.errors import DistillError
from distill.core.plugin_api.method import Update
from distill.core.utils.seeds import RngStreams
from support.sdxl_setup import make_batch, make_loop, make_setup, split
from support.tiny_sdxl import write_tiny_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers_per_block=1)


def gradients(networks):
    return [p.grad.clone() for p in networks.parameters("student")]


def loss_and_gradients(method, networks, context, batch, step=0):
    (update,) = method.updates(context.at(step, batch.positions), batch, step)
    for p in networks.parameters("student"):
        p.grad = None
    update.loss.backward(inputs=networks.parameters("student"))
    return update.loss.item(), gradients(networks)


def papers_loss(family, networks, batch, *, model_type, seed, step, config):
    """Algorithm 1 of arXiv 2310.04378 in numpy-like tensors, with nothing of the method's or the diffusion core's."""
    betas = torch.from_numpy(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    bar = torch.cumprod(1 - betas, 0)
    x0, n = batch.latents, len(batch)
    rng = RngStreams(seed, step, batch.positions)
    i = rng.integers("index", 50)
    eps = rng.randn("noise", x0.shape[1:]).double()
    omega = rng.uniform("w", config.w_min, config.w_max)  # guidance scale
    t = (i + 1) * 20 - 1
    t_prev = torch.maximum(t - 20, torch.zeros_like(t))
    a, s = bar[t].sqrt().reshape(n, 1, 1, 1), (1 - bar[t]).sqrt().reshape(n, 1, 1, 1)
    a_, s_ = bar[t_prev].sqrt().reshape(n, 1, 1, 1), (1 - bar[t_prev]).sqrt().reshape(n, 1, 1, 1)
    x_t = a * x0 + s * eps

    unet = networks.base
    added = lambda c, pooled: {"text_embeds": pooled, "time_ids": c["time_ids"]}  # noqa: E731

    def call(module, x, time, cond, pooled, embeds, w=None):
        extra = {}
        if w is not None:
            half = 128
            freq = torch.exp(torch.arange(half).double() * -(np.log(10000.0) / (half - 1)))
            arg = 1000.0 * w.double()[:, None] * freq[None].double()
            extra = {"timestep_cond": torch.cat([arg.sin(), arg.cos()], 1)}
        return module(x, time, encoder_hidden_states=embeds, added_cond_kwargs=added(cond, pooled), **extra).sample

    c = batch.cond
    with torch.no_grad():
        with networks.use("teacher"):
            e_c = call(unet, x_t, t, c, c["pooled_prompt_embeds"], c["prompt_embeds"])
            e_u = call(
                unet, x_t, t, c, torch.zeros_like(c["pooled_prompt_embeds"]), torch.zeros_like(c["prompt_embeds"])
            )
        g = omega.reshape(n, 1, 1, 1)
        x0_c, x0_u = (x_t - s * e_c) / a, (x_t - s * e_u) / a
        x0_hat, eps_hat = x0_u + g * (x0_c - x0_u), e_u + g * (e_c - e_u)
        x_prev = a_ * x0_hat + s_ * eps_hat

    def f(role, x, time, a, s):
        m, sd = 10.0, 0.5
        skip = sd**2 / ((m * time.double()) ** 2 + sd**2)
        out = (m * time.double()) / ((m * time.double()) ** 2 + sd**2).sqrt()
        w = omega - 1 if model_type == "full" else None
        with networks.use(role) as module:
            e = call(module, x, time, c, c["pooled_prompt_embeds"], c["prompt_embeds"], w)
        shape = (n, 1, 1, 1)
        return skip.reshape(shape) * x + out.reshape(shape) * (x - s * e) / a

    with torch.no_grad():
        target = f("student" if model_type == "lora" else "target", x_prev, t_prev, a_, s_)
    difference = f("student", x_t, t, a, s) - target
    if config.loss_type == "l2":
        return (difference**2).mean()
    return ((difference**2 + config.huber_c**2).sqrt() - config.huber_c).mean()


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_one_step_equals_the_papers_algorithm(folder, model_type, loss_type):
    family, method, networks, context = make_setup(folder, model_type=model_type, loss_type=loss_type)
    batch = make_batch(family)
    if model_type == "full":  # student, target and teacher must differ for the test to mean anything
        for p in networks.parameters("student"):
            p.data.mul_(1.01)
    loss, grads = loss_and_gradients(method, networks, context, batch, step=7)
    expected = papers_loss(family, networks, batch, model_type=model_type, seed=0, step=7, config=method.config)
    for p in networks.parameters("student"):
        p.grad = None
    expected.backward(inputs=networks.parameters("student"))
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    for ours, theirs in zip(grads, gradients(networks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_conventions_of_guidance_agree(folder):
    losses = []
    for convention, low, high in [("scale", 2.0, 6.0), ("paper", 1.0, 5.0)]:
        family, method, networks, context = make_setup(folder, guidance_convention=convention, w_min=low, w_max=high)
        losses.append(loss_and_gradients(method, networks, context, make_batch(family))[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_lora_off_equals_teacher_and_on_differs(folder):
    family, _, networks, context = make_setup(folder)
    batch = make_batch(family)
    t = torch.tensor([999, 499, 19, 0])
    pristine = type(family)(family.config, family.settings).load_network().double()
    plain = family.predict(pristine, batch.latents, t, batch.cond)
    with torch.no_grad():
        teacher = context.predict("teacher", batch.latents, t, batch.cond).output
        student = context.predict("student", batch.latents, t, batch.cond).output
    assert torch.equal(teacher, plain)
    assert (student - teacher).abs().max() > 1e-3


def test_a_fresh_student_is_its_teacher(folder):
    for model_type in ("lora", "full"):
        family, _, networks, context = make_setup(folder, model_type=model_type, random_b=False)
        batch = make_batch(family)
        t = torch.tensor([999, 499, 19, 0])
        w = torch.full((4,), 3.0, dtype=torch.float64) if model_type == "full" else None
        with torch.no_grad():
            teacher = context.predict("teacher", batch.latents, t, batch.cond).output
            student = context.predict("student", batch.latents, t, batch.cond, guidance=w).output
        torch.testing.assert_close(student, teacher, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_teacher_is_bitwise_untouched_and_student_moves(folder, model_type):
    family, method, networks, context = make_setup(folder, model_type=model_type)
    trained = {id(p) for p in networks.parameters("student")}
    before = {n: p.clone() for n, p in networks.base.state_dict(keep_vars=True).items() if id(p) not in trained}
    flags = {n: p.requires_grad for n, p in networks.base.named_parameters()}
    start = [p.clone() for p in networks.parameters("student")]
    loop = make_loop(method, networks, context)
    for step in range(3):
        loop.step(step, [make_batch(family, seed=step)])
    now = networks.base.state_dict(keep_vars=True)
    assert before
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert {n: p.requires_grad for n, p in networks.base.named_parameters()} == flags
    assert all(not torch.equal(p, q) for p, q in zip(networks.parameters("student"), start, strict=True))


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(folder, model_type):
    results = []
    for checkpointing in (False, True):
        family, method, networks, context = make_setup(folder, model_type=model_type, checkpointing=checkpointing)
        results.append(loss_and_gradients(method, networks, context, make_batch(family)))
    assert results[0][0] == results[1][0]
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-10, atol=1e-14)


def test_one_backward_may_cross_student_and_teacher_under_checkpointing(folder):
    """Each recomputation runs with the adapters of its own forward pass."""
    results = []
    for checkpointing in (False, True):
        family, _, networks, context = make_setup(folder, checkpointing=checkpointing)
        batch = make_batch(family)
        t = torch.tensor([999, 499, 19, 0])
        inner = context.predict("student", batch.latents, t, batch.cond).x0
        outer = context.predict("teacher", inner, t, batch.cond).output
        loss = (outer**2).mean()
        results.append(torch.autograd.grad(loss, networks.parameters("student")))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_four_micro_batches_of_one_equal_one_batch_of_four(folder, model_type):
    losses, weights = [], []
    for parts in (1, 4):
        family, method, networks, context = make_setup(folder, model_type=model_type)
        loop = make_loop(method, networks, context)
        results = [loop.step(step, split(make_batch(family, seed=step), parts)) for step in range(3)]
        losses.append([(r.metrics["loss"].item(), r.metrics["grad_norm"].item()) for r in results])
        weights.append([p.clone() for p in networks.parameters("student")])
    assert np.allclose(losses[0], losses[1], rtol=1e-9)
    for one, four in zip(*weights, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-6, atol=1e-9)


def test_clipping_is_of_the_global_norm(folder):
    family, method, networks, context = make_setup(folder)
    loop = make_loop(method, networks, context)
    optimizer = loop.optimizers["student"]
    optimizer._max_grad_norm = 1e-3
    seen = []
    optimizer.optimizer.step = lambda: seen.append(
        torch.nn.utils.get_total_norm([p.grad for p in optimizer.parameters])
    )
    result = loop.step(0, [make_batch(family)])
    assert result.metrics["grad_norm"] > 1e-2, "logged before clipping"
    assert seen[0].item() == pytest.approx(1e-3, rel=1e-3)


def test_bad_updates_are_withheld_and_end_the_run_with_names(folder):
    family, method, networks, context = make_setup(folder)
    loop = make_loop(method, networks, context)
    good = make_batch(family)
    loop.step(0, [good])
    before = [p.clone() for p in networks.parameters("student")]
    moments = loop.optimizers["student"].optimizer.state_dict()["state"][0]["exp_avg"].clone()
    bad = make_batch(family)
    bad.latents[2] = float("nan")
    for step in range(1, 4):
        loop.step(step, [bad])
    with pytest.raises(DistillError, match="set/2"):
        loop.step(4, [bad])
    assert all(torch.equal(p, q) for p, q in zip(networks.parameters("student"), before, strict=True))
    assert torch.equal(loop.optimizers["student"].optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert loop.health.total == 3


def test_an_update_reaches_only_its_own_role(folder):
    class Crossing(type(make_setup(folder)[1])):
        def updates(self, context, batch, step):
            t = torch.full((len(batch),), 499)
            w = torch.full((len(batch),), 2.0, dtype=torch.float64)
            student = context.predict("student", batch.latents, t, batch.cond, guidance=w).x0
            target = context.predict("target", batch.latents, t, batch.cond, guidance=w).x0
            yield Update("student", ((student - target) ** 2).mean() + (student**2).mean())

    family, method, networks, context = make_setup(folder, model_type="full")
    crossing = Crossing(method.config, method.setup)
    loop = make_loop(crossing, networks, context)
    others = [p for p in networks.base.parameters()]
    loop.step(0, [make_batch(family)])
    assert all(p.grad is None for p in others)


def test_ema_moves_once_per_optimizer_step(folder):
    family, method, networks, context = make_setup(folder, model_type="full")
    loop = make_loop(method, networks, context)
    start = [p.clone() for p in networks._all_parameters("target")]
    loop.step(0, split(make_batch(family), 4))
    for before, online, average in zip(
        start, networks.parameters("student"), networks._all_parameters("target"), strict=True
    ):
        torch.testing.assert_close(average, 0.95 * before + 0.05 * online)
