"""Mean flows against closed forms: the exact map is the fixed point, students reach it, and the step is the paper's.

Data N(c, q^2) and a mixture; the guided teacher of the former is N(g c, q^2), so map, average velocity and its derivative
along the trajectory are known. Reference: arXiv 2505.13447.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distill.core import context as context_module
from distill.core.context import Context, Runtime
from distill.core.diffusion import Prediction, append_dims
from distill.core.errors import UserError
from distill.core.flow_map import FlowMapScheduler
from distill.core.method import MethodSetup
from distill.core.networks import Networks
from distill.core.plugins import Registry
from distill.core.random import Draws
from distill.distill_methods.meanflow import (
    MeanFlow,
    adaptive_weight,
    flow_time,
    flow_time_speed,
    time_of_flow_time,
)
from support import gaussian, mixture
from support.closed_form import PATHS, SDXL, TABLE, train
from support.flow_map_net import FlowMapFamily, QuickDraws, gaussian_du, gaussian_map, gaussian_u
from support.gaussian import gaussian_batch
from support.mixture import mixture_batch
from support.pairs import distill, said
from support.tiny_sdxl import write_tiny_sdxl
from support.trial import make_trial

SCALE, MEAN, SIZE = 2.0, 0.6, 64
EVERYWHERE = {"time_mean": 0.0, "time_std": 1.6}
"""Times nearly uniform in tau: a test asks for one step as well."""


def make(path, *, exact=None, model_type="full", size=SIZE, data="gaussian", **settings):
    """(method, context, batch) on data of one prompt."""
    kind, schedule = PATHS[path] if isinstance(path, str) else path
    family = FlowMapFamily(schedule, kind, data, exact=exact)
    config = MeanFlow.Config(**{"w_min": SCALE, "w_max": SCALE, **settings})
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
def test_a_jump_is_a_step_along_the_average_velocity(path):
    """z_rho = z_tau - (tau - rho) u with u = eps - x0 is alpha_r x0 + sigma_r eps in the schedule's coordinates."""
    kind, schedule = PATHS[path]
    g = torch.Generator().manual_seed(0)
    x, output = (torch.randn(SIZE, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t, r = (schedule.t_max * torch.rand(2, SIZE, generator=g, dtype=torch.float64)).sort(dim=0, descending=True).values
    prediction = Prediction(output, x, t, schedule, kind)
    norm, norm_r = (append_dims(schedule.alpha(time) + schedule.sigma(time), x) for time in (t, r))
    interval = append_dims(flow_time(schedule, t) - flow_time(schedule, r), x)
    z_rho = x / norm - interval * prediction.as_kind("flow")
    torch.testing.assert_close(norm_r * z_rho, prediction.jump(r), rtol=1e-9, atol=1e-9)


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


def test_a_student_that_is_told_the_guidance_is_exact_at_each():
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
        return context.predict("student", x, t, batch.cond, r=r).as_kind("flow")

    torch.testing.assert_close(u(x_t, t), gaussian_u(z, tau[:, None], rho[:, None], mean), rtol=1e-8, atol=1e-8)
    guided = context.teacher_cfg(x_t, t, batch.cond, torch.full((SIZE,), SCALE, dtype=torch.float64))
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


def teach(path, data="gaussian", *, num_steps, scale=SCALE, lr=1e-2):
    """The context of a trained student, drawing whole batches at once."""
    kind, schedule = PATHS[path]
    config = MeanFlow.Config(w_min=scale, w_max=scale, derivative="difference", difference_step=1e-3, **EVERYWHERE)
    batch_of = gaussian_batch if data == "gaussian" else mixture_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_module, "Draws", QuickDraws)
        return train(
            MeanFlow, config, FlowMapFamily(schedule, kind, data), lambda step: batch_of(step, 1024, mean=MEAN),
            num_steps=num_steps, lr=lr,
        )[2]  # fmt: skip


def walk(context, num_steps, jump):
    """`num_steps` jumps from noise to time 0, the same noise each time; jump(x, t, r) -> x_r."""
    schedule = context.schedule
    edges = torch.linspace(schedule.t_max, 0, num_steps + 1, dtype=torch.float64)
    noise = Draws(1, 0, tuple(range(256))).randn("start", (1,)).double()
    x = schedule.sigma(edges[:1]) * noise
    for t, r in zip(edges, edges[1:], strict=False):
        x = jump(x, t.expand(256), r.expand(256))
    return x


def errors(context, num_steps, *, exact, guided):
    """RMS distances to the exact map: the student's, and that of a student whose target lacks the derivative.

    The latter's optimum is the guided teacher's velocity, whatever r, so its jumps are the teacher's.
    """
    schedule, c = context.schedule, full(MEAN, 256)

    def student(x, t, r):
        with torch.no_grad():
            return context.predict("student", x, t, {"mean": c}, r=r).jump(r)

    def without(x, t, r):
        (alpha_r, sigma_r), (x_0, eps) = schedule.coefficients(r, x), guided(*schedule.coefficients(t, x), x)
        return alpha_r * x_0 + sigma_r * eps

    truth = walk(context, 1, exact)
    found = (walk(context, num_steps, jump) - truth for jump in (student, without))
    return tuple(error.square().mean().sqrt().item() for error in found)


def gaussian_errors(context, num_steps):
    schedule, mean = context.schedule, full(SCALE * MEAN, 256)

    def guided(alpha, sigma, x):
        eps = sigma * (x - alpha * mean) / (alpha**2 * gaussian.Q**2 + sigma**2)
        return mean + alpha * gaussian.Q**2 / sigma * eps, eps

    return errors(
        context, num_steps, exact=lambda x, t, r: gaussian_map(schedule, x, t, r, mean), guided=guided
    )


@pytest.mark.parametrize("path", ["eps", "v-zero-snr", "x0", "flow"])
def test_students_reach_the_flow_map_of_a_gaussian(path):
    context = teach(path, num_steps=700)
    for num_steps in (1, 2, 4):
        right, wrong = gaussian_errors(context, num_steps)
        print(f"{path} steps={num_steps}: right {right:.2e} wrong {wrong:.2e}")
        assert right <= 0.1 * wrong, (num_steps, right, wrong)


def test_the_error_falls_with_training():
    found = [gaussian_errors(teach("flow", num_steps=number), 1)[0] for number in (30, 120)]
    found.append(gaussian_errors(teach("flow", num_steps=700), 1)[0])
    assert found[0] > 2 * found[1] > 4 * found[2], found


@pytest.mark.parametrize("path", ["eps", "flow"])
def test_students_reach_the_flow_map_of_a_mixture(path):
    scale = 1.2  # much more would carry the paths away from the data that students are trained at
    context = teach(path, "mixture", num_steps=1000, scale=scale, lr=3e-2)
    schedule, c = context.schedule, full(MEAN, 256)

    def exact(x, t, r):
        return mixture.ode_map(schedule, x, t, r, c, scale=scale)

    def guided(alpha, sigma, x):
        return mixture.guided_parts(alpha, sigma, x, c, scale)

    for num_steps in (1, 2, 4):
        right, wrong = errors(context, num_steps, exact=exact, guided=guided)
        print(f"{path} steps={num_steps}: right {right:.2e} wrong {wrong:.2e}")
        assert right <= 0.1 * wrong, (num_steps, right, wrong)
