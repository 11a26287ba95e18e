"""What the context offers a method, against closed forms: rollouts, derivatives, joint calls, shared draws."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from distill.core.diffusion import classifier_free_guidance
from distill.core.engine.networks import Networks
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.method import Role
from distill.core.testing.gaussian import GaussianFamily, denoise
from distill.core.testing.paths import PATHS
from distill.core.utils.seeds import RngStreams

MEAN, SIZE = 0.6, 6
COND = {"mean": torch.full((SIZE, 1), MEAN, dtype=torch.float64)}


def make(path="eps", *, num_times=8, average=None):
    kind, schedule = PATHS[path]
    grid = schedule.grid(num_times)
    family = GaussianFamily(schedule, kind, torch.cat([grid.previous[:1], grid.times]))
    roles = [Role("teacher"), Role("student", trains="full")]
    networks = Networks(family, roles, lora=None, seed=0, parameter_dtype=torch.float64)
    runtime = Runtime(family, networks, seed=3, device=torch.device("cpu"), average=average)
    return Context(runtime, step=5, positions=range(SIZE)), family, networks, grid


def noise(context, name="x"):
    return context.rng.randn(name, (1,)).double()


# -- joint calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_cond_and_uncond_are_the_two_predictions_and_one_call(path):
    context, family, _, grid = make(path)
    x, t = noise(context), grid.times[[1, 2, 3, 4, 5, 6]]
    calls, predict = [], family.predict
    family.predict = lambda network, x_t, *a, **k: (calls.append(len(x_t)), predict(network, x_t, *a, **k))[1]
    cond, uncond = context.predict_cond_uncond("student", x, t, COND)
    assert calls == [2 * SIZE]
    apart = [context.predict("student", x, t, c) for c in (COND, {"mean": torch.zeros(SIZE, 1).double()})]
    for ours, theirs in zip((cond, uncond), apart, strict=True):
        torch.testing.assert_close(ours.output, theirs.output, rtol=1e-13, atol=1e-13)
        assert ours.prediction_type == theirs.prediction_type
        torch.testing.assert_close(ours.x0, theirs.x0, rtol=1e-12, atol=1e-12)
    scale = torch.linspace(0, 8, SIZE).double()
    torch.testing.assert_close(
        context.predict_guided(x, t, COND, scale).x0, classifier_free_guidance(*apart, scale).x0, rtol=1e-9, atol=1e-9
    )
    if context.schedule.alpha(t).min() > 0:
        expected = denoise(context.schedule, x, t, torch.zeros(SIZE, 1).double())
        torch.testing.assert_close(uncond.x0, expected, rtol=1e-9, atol=1e-9)


def test_guidance_may_be_of_any_role():
    context, _, networks, grid = make()
    x, t, scale = noise(context), grid.times[3].expand(SIZE), torch.full((SIZE,), 2.0).double()
    before = context.predict_guided(x, t, COND, scale)
    for parameter in networks.parameters("student"):
        parameter.data *= 1.5
    assert torch.equal(context.predict_guided(x, t, COND, scale).x0, before.x0)
    assert not torch.equal(context.predict_guided(x, t, COND, scale, role="student").x0, before.x0)


# -- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["eps", "v", "x0", "flow", "flow-shift"])
def test_a_rollout_is_multistep_sampling_written_out(path):
    context, _, _, grid = make(path)
    times = [grid.times[i].expand(SIZE) for i in (7, 4, 2)]
    start = noise(context)
    found = context.rollout("student", times, start, COND, name="roll")
    x, rng = start, RngStreams(3, 5, range(SIZE))
    for i in range(2):
        x_0 = denoise(context.schedule, x, times[i], COND["mean"])
        x = context.schedule.add_noise(x_0, rng.randn(f"roll/{i}", (1,)).double(), times[i + 1])
    torch.testing.assert_close(found.x_t, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.x0, denoise(context.schedule, x, times[2], COND["mean"]), rtol=1e-9, atol=1e-9)
    assert torch.equal(found.t, times[2])


def test_only_the_last_call_of_a_rollout_carries_a_gradient():
    context, _, networks, grid = make()
    times = [grid.times[i].expand(SIZE) for i in (7, 4, 2)]
    prediction = context.rollout("student", times, noise(context), COND, name="roll")
    assert not prediction.x_t.requires_grad
    rolled = torch.autograd.grad(prediction.x0.square().sum(), networks.parameters("student"))
    alone = context.predict("student", prediction.x_t, times[2], COND).x0.square().sum()
    for ours, theirs in zip(rolled, torch.autograd.grad(alone, networks.parameters("student")), strict=True):
        assert torch.equal(ours, theirs)
    one = context.rollout("student", times[:1], noise(context), COND, name="roll")
    assert torch.equal(one.x_t, noise(context)), "one call sees what it is given"


@pytest.mark.parametrize("path", ["eps", "v", "flow-shift"])
@pytest.mark.parametrize("calls", [2, 3, 9])
def test_the_last_calls_of_a_rollout_carry_the_gradient_of_autograd_through_them(path, calls):
    context, _, networks, grid = make(path)
    for parameter in networks.parameters("student"):
        parameter.data *= 1.1
    times = [grid.times[i].expand(SIZE) for i in (7, 4, 2)]
    rolled = context.rollout("student", times, noise(context), COND, name="roll", gradient_calls=calls)
    x, rng = noise(context), RngStreams(3, 5, range(SIZE))
    for i in range(2):
        with torch.set_grad_enabled(i >= 3 - calls):
            x_0 = context.predict("student", x, times[i], COND).x0
            x = context.schedule.add_noise(x_0, rng.randn(f"roll/{i}", (1,)).double(), times[i + 1])
    by_hand = context.predict("student", x, times[2], COND).x0
    last = context.rollout("student", times, noise(context), COND, name="roll")
    assert torch.equal(rolled.x0, by_hand)
    assert torch.equal(rolled.x0, last.x0), "the gradient changes no value"
    assert rolled.x_t.requires_grad
    parameters = networks.parameters("student")
    ours, theirs, short = (torch.autograd.grad(x_0.square().sum(), parameters) for x_0 in (rolled.x0, by_hand, last.x0))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(ours, short, strict=True))


def test_a_rollout_carries_a_gradient_where_one_is_wanted_alone():
    context, _, _, grid = make()
    times = [grid.times[i].expand(SIZE) for i in (7, 4)]
    with torch.no_grad():
        assert not context.rollout("student", times, noise(context), COND, name="a", gradient_calls=2).x0.requires_grad
    with pytest.raises(ValueError, match="gradient_calls = 0"):
        context.rollout("student", times, noise(context), COND, name="a", gradient_calls=0)


def test_by_sample_is_the_function_of_each_sample_with_its_gradient():
    context, *_ = make()
    x, weight = torch.randn(4, 3, dtype=torch.float64).requires_grad_(), torch.tensor(2.0).double().requires_grad_()
    seen = []

    def cubed(row, factor):
        seen.append(len(row))
        return weight * factor * row.pow(3).sum(1)

    factors = torch.arange(4.0).double()
    found, expected = context.by_sample(cubed, x, factors), weight * factors * x.pow(3).sum(1)
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad(each.square().sum(), (x, weight), retain_graph=True) for each in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert seen == [1] * 8, "once forth and once back"


def test_a_rollout_is_the_same_however_the_batch_is_cut():
    context, _, _, grid = make()
    times = [grid.times[i] for i in (7, 4, 2)]
    whole = context.rollout("student", [t.expand(SIZE) for t in times], noise(context), COND, name="roll").x0
    for position in range(SIZE):
        part = context.at(5, (position,))
        cond = {"mean": COND["mean"][:1]}
        own = part.rollout("student", [t.expand(1) for t in times], noise(part), cond, name="roll").x0
        torch.testing.assert_close(own[0], whole[position], rtol=1e-14, atol=1e-14)


# -- derivatives ------------------------------------------------------------------------------------------------------


def test_jvp_is_the_analytic_derivative_and_differences_approach_it():
    context, *_ = make()
    x, t = torch.linspace(-1, 2, SIZE).double()[:, None], torch.linspace(0.1, 0.9, SIZE).double()
    v, one = x.cos(), torch.full_like(t, 0.5)
    function = lambda x, t: torch.sin(x) * t[:, None] ** 3  # noqa: E731
    exact = torch.cos(x) * v * t[:, None] ** 3 + torch.sin(x) * 3 * t[:, None] ** 2 * 0.5
    found = context.jvp(function, (x, t), (v, one))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    errors = [(context.jvp(function, (x, t), (v, one), step=h) - exact).abs().max().item() for h in (1e-2, 5e-3)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05), "of second order"
    assert errors[0] < 1e-3


@pytest.mark.parametrize("step", [None, 1e-4])
def test_jvp_through_a_network_is_the_derivative_of_its_prediction_and_leaves_no_graph(step):
    """The perfect denoiser is affine in x with slope a q^2 / (a^2 q^2 + s^2)."""
    context, _, networks, grid = make("x0")
    x, t = noise(context), grid.times[[1, 2, 3, 4, 5, 6]]
    v = x.sin()
    found = context.jvp(lambda x: context.predict("student", x, t, COND).x0, (x,), (v,), step=step)
    a, s = context.schedule.coefficients(t, x)
    torch.testing.assert_close(found, a * 0.25 / (a**2 * 0.25 + s**2) * v, rtol=1e-7, atol=1e-9)
    assert not found.requires_grad
    assert all(p.requires_grad and p.grad is None for p in networks.parameters("student"))


def test_jvp_of_a_constant_function_is_refused():
    context, *_ = make()
    with pytest.raises(AssertionError, match="does not depend"):
        context.jvp(lambda x: torch.ones(2), (torch.zeros(2),), (torch.ones(2),))


# -- draws and statistics ---------------------------------------------------------------------------------------------


def test_shared_integers_are_one_for_all_samples_and_processes_and_uniform_over_steps():
    seen = [RngStreams(3, step, range(4)).shared_integer("calls", 4) for step in range(4000)]
    assert seen == [RngStreams(3, step, (17,)).shared_integer("calls", 4) for step in range(4000)], "whoever asks"
    counts = torch.bincount(torch.tensor(seen), minlength=4)
    assert len(counts) == 4
    chi_square = ((counts - 1000.0) ** 2 / 1000).sum()
    assert chi_square < 16.3, "3 degrees of freedom, p = 0.001"
    repeats = sum(a == b for a, b in pairwise(seen)) / 3999
    assert repeats == pytest.approx(0.25, abs=0.03), "steps are independent"


def test_shared_integers_depend_on_seed_and_name_and_on_no_samples_draw():
    asked = ((3, "a"), (3, "b"), (4, "a"))
    names = [[RngStreams(seed, step, ()).shared_integer(name, 100) for step in range(50)] for seed, name in asked]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert sum(a == b for a, b in zip(names[i], names[j], strict=True)) < 8
    own = [RngStreams(3, step, (0,)).integers("a", 100).item() for step in range(50)]
    assert sum(a == b for a, b in zip(names[0], own, strict=True)) < 8


def test_draws_of_a_sample_depend_on_its_position_alone():
    whole, part = RngStreams(3, 5, range(6)), RngStreams(3, 5, (4, 1))
    for draw in (lambda d: d.randn("n", (3, 2)), lambda d: d.uniform("u", 2, 5), lambda d: d.integers("i", 1000)):
        assert torch.equal(draw(whole)[[4, 1]], draw(part))
        assert not torch.equal(draw(whole), draw(RngStreams(3, 6, range(6))))


def test_statistics_are_averaged_over_processes_where_there_are_several():
    tensor = torch.tensor([1.0, 2.0])
    make()[0].average([tensor])
    assert tensor.tolist() == [1.0, 2.0], "alone, nothing happens"
    make(average=lambda tensors: [t.mul_(0.5) for t in tensors])[0].average([tensor])
    assert tensor.tolist() == [0.5, 1.0]


# -- where things run -------------------------------------------------------------------------------------------------


def test_a_context_knows_its_step_and_hands_on_its_run():
    context, *_ = make()
    other = context.at(9, (2, 3))
    assert (context.step, other.step) == (5, 9)
    assert other.rng.positions == (2, 3)
    assert other.grid(8) is context.grid(8), "made once"


def test_second_times_reach_the_family_in_the_networks_units():
    context, family, _, grid = make("flow-shift")
    told, predict = [], family.predict
    family.predict = lambda *a, second_time=None, **k: (told.append(second_time), predict(*a, **k))[1]
    x, t, r = noise(context), grid.times[5].expand(SIZE), grid.times[2].expand(SIZE)
    context.predict("student", x, t, COND, r=r)
    context.predict("student", x, t, COND)
    assert torch.equal(told[0], context.schedule.network_time(r))
    assert told[1] is None


# -- memory -----------------------------------------------------------------------------------------------------------


def test_activations_wait_on_the_host_only_where_a_gradient_needs_them(monkeypatch):
    from distill.core.plugin_api import context as module

    held, (context, _, networks, grid) = [], make()
    x, t = noise(context), grid.times[:SIZE]
    expected = torch.autograd.grad(context.predict("student", x, t, COND).output.sum(), networks.parameters("student"))

    def offload(*, pin_memory):
        assert not pin_memory  # for CUDA alone
        return torch.autograd.graph.saved_tensors_hooks(lambda s: (held.append(s.nbytes), s)[1], lambda s: s)

    monkeypatch.setattr(module, "save_on_cpu", offload)
    context._runtime = replace(context._runtime, activation_offload=True)
    with torch.no_grad():
        context.predict("student", x, t, COND)
    assert not held
    output = context.predict("student", x, t, COND).output
    found = torch.autograd.grad(output.sum(), networks.parameters("student"))
    assert sum(held) > 0
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
