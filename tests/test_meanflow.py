"""Mean flows against closed forms: the exact map is the fixed point, students reach it, and the step is the paper's.

Data N(c, q^2) and a mixture; the guided teacher of the former is N(g c, q^2), so map, average velocity and its
derivative along the trajectory are known. Reference: arXiv 2505.13447.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from distill.core.diffusion import Prediction, append_dims
from distill.core.diffusion.flow_map import FlowMapScheduler
from distill.core.engine.networks import Networks
from distill.core.plugin_api import context as context_module
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.method import MethodSetup
from distill.core.testing import gaussian
from distill.core.testing.gaussian import gaussian_batch, gaussian_map
from distill.core.testing.paths import NOISE as SDXL
from distill.core.testing.paths import PATHS, TABLE, train
from distill.core.testing.rng import BatchedRngStreams
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.meanflow import (
    MeanFlow,
    adaptive_weight,
    flow_time,
    flow_time_speed,
    time_of_flow_time,
    truncated_logit_normal,
)
from support import mixture
from support.config_files import distill, said
from support.flow_map_net import FlowMapFamily, gaussian_du, gaussian_u
from support.mixture import mixture_batch
from support.tiny_sdxl import write_tiny_sdxl
from support.trial import LORA, make_trial

SCALE, MEAN, SIZE = 2.0, 0.6, 64
EVERYWHERE = {"time_mean": 0.0, "time_std": 1.6}
"""Times nearly uniform in tau: a test asks for one step as well."""


def make(path, *, exact=None, model_type="full", size=SIZE, data="gaussian", **settings):
    """(method, context, batch) on data of one prompt."""
    kind, schedule = PATHS[path] if isinstance(path, str) else path
    family = FlowMapFamily(schedule, kind, data, exact=exact)
    config = MeanFlow.Config(**{"w_min": SCALE, "w_max": SCALE, "derivative": "exact", **settings})
    method = MeanFlow(config, MethodSetup(model_type))
    networks = Networks(family, method.roles(config, method.setup), lora=None, seed=0, parameter_dtype=torch.float64)
    context = Context(Runtime(family, networks, seed=3, device=torch.device("cpu")), positions=range(size))
    return method, context, gaussian_batch(0, size, mean=MEAN)


def only_update(method, context, batch, step=0):
    (update,) = method.updates(context, batch, step)
    return update


def full(value, size=SIZE):
    return torch.full((size, 1), value, dtype=torch.float64)


# -- coordinates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_flow_times_invert_and_their_speed_is_their_derivative(path):
    schedule = PATHS[path][1]
    t = torch.linspace(0, schedule.t_max, 1999, dtype=torch.float64)
    tau = flow_time(schedule, t)
    assert bool((tau.diff() > 0).all())
    torch.testing.assert_close(time_of_flow_time(schedule, tau), t, rtol=1e-9, atol=1e-9)
    beyond = time_of_flow_time(schedule, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert beyond.tolist() == [0.0, schedule.t_max]
    h = 1e-4 * schedule.t_max
    inside = (t[:-1] + t[1:]) / 2  # between the kinks of a table
    numeric = (flow_time(schedule, inside + h) - flow_time(schedule, inside - h)) / (2 * h)
    torch.testing.assert_close(flow_time_speed(schedule, inside), 1 / numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_ddim_step_is_a_step_along_the_average_velocity(path):
    """z_rho = z_tau - (tau - rho) u with u = eps - x0 is alpha_r x0 + sigma_r eps in the schedule's coordinates."""
    kind, schedule = PATHS[path]
    g = torch.Generator().manual_seed(0)
    x, output = (torch.randn(SIZE, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t, r = (schedule.t_max * torch.rand(2, SIZE, generator=g, dtype=torch.float64)).sort(dim=0, descending=True).values
    prediction = Prediction(output, x, t, schedule, kind)
    norm, norm_r = (append_dims(schedule.alpha(time) + schedule.sigma(time), x) for time in (t, r))
    interval = append_dims(flow_time(schedule, t) - flow_time(schedule, r), x)
    z_rho = x / norm - interval * prediction.as_type("flow")
    torch.testing.assert_close(norm_r * z_rho, prediction.ddim_step(r), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["eps", "v-zero-snr", "flow"])
def test_schedules_can_be_differentiated_forward_up_to_their_ends(path):
    from torch.autograd import forward_ad

    schedule = PATHS[path][1]
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64) * schedule.t_max
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones_like(t))
        alpha, sigma = (forward_ad.unpack_dual(part(dual)).tangent for part in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(alpha, schedule.alpha_dot(t), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sigma, schedule.sigma_dot(t), rtol=1e-12, atol=1e-15)


# -- the fixed point --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_exact_flow_map_has_no_loss_and_no_gradient(path):
    method, context, batch = make(path, exact=SCALE, **EVERYWHERE)
    update = only_update(method, context, batch)
    assert update.metrics["velocity_error"] < 1e-18
    (gradient,) = torch.autograd.grad(update.loss, context._runtime.networks.parameters("student"))
    assert gradient.abs() < 1e-8
    wrong = only_update(*make(path, exact=SCALE, tangent_warmup_steps=10**9, **EVERYWHERE))
    assert wrong.metrics["velocity_error"] > 1e-3, "without the derivative the exact map is not the fixed point"


def test_a_student_that_takes_the_guidance_is_exact_at_each_scale():
    method, context, batch = make("eps", exact=SCALE, w_min=1.0, w_max=5.0)
    assert only_update(method, context, batch).metrics["velocity_error"] < 1e-18
    assert method.sampler(TABLE, guidance_scale=4.0).guidance_scale == 4.0
    assert method.sampler(TABLE, guidance_scale=9.0).guidance_scale == 3.0


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_exact_by_differences_and_analytic_agree(path):
    method, context, batch = make(path, exact=SCALE)
    schedule, x_0 = context.schedule, batch.latents
    g = torch.Generator().manual_seed(1)
    low, high = flow_time(schedule, torch.tensor([0.0, schedule.t_max], dtype=torch.float64))
    tau = low + 0.02 + (high - low - 0.04) * torch.rand(SIZE, generator=g, dtype=torch.float64)
    t = time_of_flow_time(schedule, tau)
    t = t if schedule.clean_at_zero else t.floor() + 0.5  # differences must not straddle a kink of the table
    r, tau = t / 2, flow_time(schedule, t)
    x_t = schedule.add_noise(x_0, torch.randn(SIZE, 1, generator=g, dtype=torch.float64), t)
    z, rho = x_t / append_dims(schedule.alpha(t) + schedule.sigma(t), x_t), flow_time(schedule, r)
    mean = full(SCALE * MEAN)
    analytic = gaussian_du(z, tau[:, None], rho[:, None], mean)

    def u(x, t):
        return context.predict("student", x, t, batch.cond, r=r).as_type("flow")

    torch.testing.assert_close(u(x_t, t), gaussian_u(z, tau[:, None], rho[:, None], mean), rtol=1e-8, atol=1e-8)
    guided = context.predict_guided(x_t, t, batch.cond, torch.full((SIZE,), SCALE, dtype=torch.float64))
    speed = flow_time_speed(schedule, t)
    tangents = (append_dims(speed, x_t) * guided.velocity, speed)
    torch.testing.assert_close(context.jvp(u, (x_t, t), tangents), analytic, rtol=1e-8, atol=1e-8)
    difference = context.jvp(u, (x_t, t), tangents, step=1e-4)
    torch.testing.assert_close(difference, analytic, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [TABLE, PATHS["flow-shift"][1]], ids=["ddpm", "flow"])
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_the_parametrisation_leaves_the_loss_unchanged(schedule, derivative):
    kinds = ("epsilon", "v_prediction", "sample", "flow")
    losses = [only_update(*make((kind, schedule), derivative=derivative)).loss.item() for kind in kinds]
    assert max(losses) - min(losses) <= 1e-9 * max(losses)


# -- training ---------------------------------------------------------------------------------------------------------


@cache
def teach(path, data="gaussian", *, num_steps, scale=SCALE):
    """The context of a trained student, drawing whole batches at once."""
    kind, schedule = PATHS[path]
    config = MeanFlow.Config(w_min=scale, w_max=scale, difference_step=1e-3, **EVERYWHERE)
    batch_of, size, lr = (gaussian_batch, 2048, 7e-3) if data == "gaussian" else (mixture_batch, 1024, 2e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_module, "RngStreams", BatchedRngStreams)
        return train(
            MeanFlow, config, FlowMapFamily(schedule, kind, data), lambda step: batch_of(step, size, mean=MEAN),
            num_steps=num_steps, lr=lr,
        )[2]  # fmt: skip


def walk(context, num_steps, ddim_step):
    """`num_steps` jumps from noise to time 0, the same noise each time; jump(x, t, r) -> x_r."""
    schedule = context.schedule
    edges = torch.linspace(schedule.t_max, 0, num_steps + 1, dtype=torch.float64)
    noise = RngStreams(1, 0, tuple(range(256))).randn("start", (1,)).double()
    x = schedule.sigma(edges[:1]) * noise
    for t, r in itertools.pairwise(edges):
        x = ddim_step(x, t.expand(256), r.expand(256))
    return x


def errors(context, num_steps, *, exact, guided):
    """RMS distances to the exact map: the student's, and that of a student whose target lacks the derivative.

    The latter's optimum is the guided teacher's velocity, whatever r, so its jumps are the teacher's.
    """
    schedule, c = context.schedule, full(MEAN, 256)

    def student(x, t, r):
        with torch.no_grad():
            return context.predict("student", x, t, {"mean": c}, r=r).ddim_step(r)

    def without(x, t, r):
        (alpha_r, sigma_r), (x_0, eps) = schedule.coefficients(r, x), guided(*schedule.coefficients(t, x), x)
        return alpha_r * x_0 + sigma_r * eps

    truth = walk(context, 1, exact)
    found = (walk(context, num_steps, ddim_step) - truth for ddim_step in (student, without))
    return tuple(error.square().mean().sqrt().item() for error in found)


def gaussian_errors(context, num_steps):
    schedule, mean = context.schedule, full(SCALE * MEAN, 256)

    def guided(alpha, sigma, x):
        eps = sigma * (x - alpha * mean) / (alpha**2 * gaussian.Q**2 + sigma**2)
        return mean + alpha * gaussian.Q**2 / sigma * eps, eps

    return errors(context, num_steps, exact=lambda x, t, r: gaussian_map(schedule, x, t, r, mean), guided=guided)


@pytest.mark.parametrize("path", ["eps", "v-zero-snr", "x0", "flow"])
def test_students_reach_the_flow_map_of_a_gaussian(path):
    context = teach(path, num_steps=700)
    for num_steps in (1, 2, 4):
        right, wrong = gaussian_errors(context, num_steps)
        print(f"{path} steps={num_steps}: right {right:.2e} wrong {wrong:.2e}")
        assert right <= 0.1 * wrong, (num_steps, right, wrong)


def test_the_error_falls_with_training():
    found = [gaussian_errors(teach("flow", num_steps=number), 1)[0] for number in (30, 120, 700)]
    assert found[1] < 0.7 * found[0], found
    assert found[2] < 0.1 * found[1], found


def mixture_errors(path, num_steps, *, scale, trained):
    """As `errors`, of data that is a mixture, after `trained` steps at this guidance."""
    context, c = teach(path, "mixture", num_steps=trained, scale=scale), full(MEAN, 256)

    def exact(x, t, r):
        return mixture.ode_map(context.schedule, x, t, r, c, scale=scale)

    def guided(alpha, sigma, x):
        return mixture.guided_parts(alpha, sigma, x, c, scale)

    return errors(context, num_steps, exact=exact, guided=guided)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["eps", "v-zero-snr", "x0", "flow"])
def test_students_reach_the_flow_map_of_a_mixture(path):
    for num_steps in (1, 2, 4):  # at 4 the wrong target is nearly right: it takes long training to be so much better
        right, wrong = mixture_errors(path, num_steps, scale=1.0, trained=5000)
        print(f"mixture {path} steps={num_steps}: right {right:.2e} wrong {wrong:.2e}")
        assert right <= 0.1 * wrong, (num_steps, right, wrong)


def test_students_reach_the_guided_flow_map_of_a_mixture():
    for num_steps in (1, 4):  # at 2 the table's knots in time are what is left: 0.09 to 0.12 of the wrong one
        # much more guidance would carry the paths away from the data that students are trained at
        right, wrong = mixture_errors("flow", num_steps, scale=1.2, trained=1000)
        print(f"guided mixture steps={num_steps}: right {right:.2e} wrong {wrong:.2e}")
        assert right <= 0.1 * wrong, (num_steps, right, wrong)


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_times_are_in_order_inside_the_schedule_and_as_often_equal_as_asked():
    for path, settings in (("eps", {}), ("flow", {"derivative": "difference", "difference_step": 0.05})):
        method, context, _ = make(path, size=4000, time_std=2.0, **settings)
        t, r = method._times(context)
        schedule, margin = context.schedule, settings.get("difference_step", 0.0)
        assert bool((t >= r).all())
        assert (t == r).double().mean() == pytest.approx(0.25, abs=0.03)
        ends = flow_time(schedule, torch.tensor([0.0, schedule.t_max], dtype=torch.float64))
        tau = flow_time(schedule, torch.stack([t, r]))
        assert tau.min() >= ends[0] + margin - 1e-12
        assert tau.max() <= ends[1] - margin + 1e-12
    logits = torch.logit(truncated_logit_normal(
        torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), mean=-0.4, std=1.0,
        low=torch.zeros(()).double(), high=torch.ones(()).double(),
    ))  # fmt: skip
    assert logits.mean().item() == pytest.approx(-0.4, abs=0.03)
    assert logits.std().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_adaptive_weight_scales_gradients_and_has_none_itself(power):
    error = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    squared = (error**2).sum(1)
    loss = (squared * adaptive_weight(squared, power=power, floor=0.01)).sum()
    (gradient,) = torch.autograd.grad(loss, error)
    torch.testing.assert_close(gradient, 2 * error.detach() / (squared.detach()[:, None] + 0.01) ** power)


def test_the_tangent_warm_up_begins_without_the_derivative_and_ends():
    none, half, whole = (
        only_update(*make("flow", exact=SCALE, tangent_warmup_steps=10), step=step).metrics["velocity_error"].item()
        for step in (0, 5, 10)
    )
    assert whole < 1e-18
    assert half == pytest.approx(none / 4, rel=1e-9), "the exact map lacks half of its derivative"


@pytest.mark.parametrize("path", ["eps", "v", "x0", "flow"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_sampler_follows_the_exact_flow_map(path, num_steps):
    """The exact student, run by the scheduler itself, ends where the exact map does."""
    kind, schedule = PATHS[path]
    method, context, batch = make(path, exact=SCALE)
    sampler = method.sampler(schedule, num_inference_steps=num_steps)
    assert (sampler.scheduler, sampler.guidance_scale) == ("FlowMapScheduler", 0.0)
    noise = {} if schedule.clean_at_zero else SDXL
    scheduler = FlowMapScheduler(**noise, prediction_type=kind, **sampler.config)
    scheduler.set_timesteps(sampler.num_inference_steps)
    x = torch.randn(SIZE, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, network = x, context._runtime.networks.module("student")
    unit, family = schedule.network_time(torch.ones(1, dtype=torch.float64)), context._runtime.family
    for time in scheduler.timesteps:
        scheduler.scale_model_input(x, time)
        t, r = (torch.full((SIZE,), each, dtype=torch.float64) for each in scheduler.pair)
        with torch.no_grad():
            output = family.predict(network, x, t, batch.cond, second_time=r)
        previous, x = (x, t), scheduler.step(output, time, x).prev_sample
    start = torch.full((SIZE,), float(scheduler.timesteps[0]), dtype=torch.float64) / unit
    zero, mean = torch.zeros(SIZE, dtype=torch.float64), full(SCALE * MEAN)
    if schedule.clean_at_zero:
        expected = gaussian_map(schedule, first, start, zero, mean)
    else:  # time 0 of a table is not the data: the last step goes on to it along the same average velocity
        x_t, t = previous
        torch.testing.assert_close(x_t, gaussian_map(schedule, first, start, t, mean), rtol=1e-5, atol=1e-5)
        tau, rho = (flow_time(schedule, time)[:, None] for time in (t, zero))
        z = x_t / append_dims(schedule.alpha(t) + schedule.sigma(t), x_t)
        expected = z - tau * gaussian_u(z, tau, rho, mean)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


# -- SDXL -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers_per_block=1)


def papers_loss(trial, batch, *, step):
    """The step in (z, tau), differentiated through a time conversion of its own; nothing of the diffusion core's."""
    betas = torch.from_numpy(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    bar = torch.cumprod(1 - betas, 0)
    theta = torch.acos(bar.sqrt())
    config, x0, n = trial.method.config, batch.latents, len(batch)
    rng = RngStreams(0, step, batch.positions)

    def rows(value):
        return value.reshape(n, 1, 1, 1)

    def tau_of(angle):
        return angle.sin() / (angle.sin() + angle.cos())

    def time_of(tau):
        angle = torch.atan2(tau, 1 - tau)
        j = (torch.searchsorted(theta, angle.detach()) - 1).clamp(0, 998)
        return j + (angle - theta[j]) / (theta[j + 1] - theta[j])

    normal = torch.distributions.Normal(
        torch.tensor(config.time_mean, dtype=torch.float64), torch.tensor(config.time_std, dtype=torch.float64)
    )
    low, high = (normal.cdf(torch.logit(tau_of(theta[end]))) for end in (0, -1))
    drawn = [torch.sigmoid(normal.icdf(low + (high - low) * rng.uniform(f"time-{k}"))) for k in (0, 1)]
    tau, rho = torch.maximum(*drawn), torch.minimum(*drawn)
    rho = torch.where(rng.uniform("equal") < config.equal_share, tau, rho)
    z = rows(1 - tau) * x0 + rows(tau) * rng.randn("noise", x0.shape[1:]).double()
    scale, r = rng.uniform("w", config.w_min, config.w_max), time_of(rho)

    def u(role, z, tau, cond, r=None, w=None):
        with trial.networks.use(role) as network:
            x = z / rows((tau**2 + (1 - tau) ** 2).sqrt())
            eps = trial.family.predict(network, x, time_of(tau), cond, guidance=w, second_time=r)
        return (eps - z) / (1 - rows(tau))

    with torch.no_grad():
        v_c, v_u = (u("teacher", z, tau, cond) for cond in (batch.cond, trial.family.uncond(batch.cond)))
        v = v_u + rows(scale) * (v_c - v_u)
    w = scale - 1 if trial.method.setup.model_type == "full" else None
    student = lambda z, tau: u("student", z, tau, batch.cond, r, w)  # noqa: E731
    with torch.no_grad(), trial.family.forward_ad():
        _, derivative = torch.func.jvp(student, (z, tau), (v, torch.ones_like(tau)))
    squared = ((student(z, tau) - (v - rows(tau - rho) * derivative)) ** 2).flatten(1).sum(1)
    return (squared / (squared.detach() + config.adaptive_floor) ** config.adaptive_power).mean()


def gradients(trial, loss):
    return torch.autograd.grad(loss, trial.networks.parameters("student"))


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_one_step_equals_the_papers_algorithm(folder, model_type):
    trial = make_trial(folder, MeanFlow, MeanFlow.Config(w_min=2.0, w_max=6.0, derivative="exact"), model_type)
    batch = trial.batch(7)
    loss = only_update(trial.method, trial.context.at(7, batch.positions), batch, step=7).loss
    expected = papers_loss(trial, batch, step=7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(gradients(trial, loss), gradients(trial, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_differences_agree_with_the_exact_derivative_of_a_unet(folder):
    """As far as they can: its time embedding turns by one radian per timestep, and is computed in fp32."""
    losses = []
    for settings in ({"derivative": "exact"}, {"difference_step": 2e-5}):
        config = MeanFlow.Config(adaptive_power=0.0, **settings)
        trial = make_trial(folder, MeanFlow, config, "lora")
        t = torch.tensor([150.4, 400.5, 650.5, 900.6], dtype=torch.float64)  # away from the table's kinks
        trial.method._times = lambda context, t=t: (t, t / 2 + 0.3)
        batch = trial.batch(0)
        losses.append(only_update(trial.method, trial.context.at(0, batch.positions), batch).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=3e-3)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_a_fresh_student_at_equal_times_is_its_teacher(folder, model_type):
    method = MeanFlow(MeanFlow.Config(), MethodSetup(model_type))
    trial = make_trial(folder, MeanFlow, method.config, model_type)
    networks = Networks(
        trial.family, method.roles(method.config, method.setup), seed=0, parameter_dtype=torch.float64,
        lora=LORA if model_type == "lora" else None,
    )  # fmt: skip
    networks.base.double()
    context = Context(Runtime(trial.family, networks, seed=0, device=torch.device("cpu")))
    batch, t = trial.batch(0), torch.tensor([999, 499.5, 19, 0], dtype=torch.float64)
    with torch.no_grad():
        teacher = context.predict("teacher", batch.latents, t, batch.cond).output
        for r in (t, t / 2):
            student = context.predict("student", batch.latents, t, batch.cond, r=r).output
            torch.testing.assert_close(student, teacher, rtol=1e-12, atol=1e-12)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_family_without_a_second_time_is_refused_before_weights_load(tmp_path):
    plugin = Path(__file__).parent / "support" / "fake_plugin.py"
    result = distill(
        "run", "--plugin", plugin, "--method", "meanflow", "--family", "plain-family", "--model", tmp_path / "none",
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 2
    text = said(result.stderr)
    assert "'meanflow'" in text
    assert "'plain-family'" in text
    assert "takes a second time" in text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"w_min": 6.0, "w_max": 5.0}, "w_min = 6.0 is above w_max = 5.0"),
        ({"equal_share": 1.0}, "equal_share"),
        ({"time_std": 0.0}, "time_std"),
        ({"difference_step": 0.0}, "difference_step"),
        ({"derivative": "backward"}, "derivative"),
        ({"adaptive_power": -1}, "adaptive_power"),
        ({"kappa": 0.5}, "kappa"),
    ],
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        MeanFlow.Config(**settings)


def test_a_notice_explains_a_range_of_guidance():
    def notice(model_type, **settings):
        return MeanFlow(MeanFlow.Config(**settings), MethodSetup(model_type)).notices()[0]

    assert "built in" in notice("lora")
    assert "learns the one of 4" in notice("lora", w_min=2.0, w_max=6.0)
    assert "as an input" in notice("full", w_min=2.0, w_max=6.0)
    assert "scale is 6" in notice("full", w_min=5.0, w_max=5.0, guidance_convention="paper")
