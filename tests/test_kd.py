"""Knowledge distillation reaches the exact flow map of known data, at the times it is trained at."""

from dataclasses import replace

import pytest
import torch
from distill.core.data.cache.teacher_trajectory import follow
from distill.core.diffusion import FlowSchedule, Prediction
from distill.core.diffusion.solvers import trailing_timesteps
from distill.core.errors import UserError
from distill.core.plugin_api.batch import Batch, Trajectories
from distill.core.plugin_api.method import MethodSetup, Requirements
from distill.core.testing.gaussian import GaussianFamily, Q, raw_output
from distill.core.testing.paths import PATHS, TABLE, train
from distill.distill_methods.kd import KD
from pydantic import ValidationError

MEAN, SCALE = 0.6, 2.0
STEPS = 4


def teacher(schedule, kind):
    """Exact predictions of the guided teacher: N(SCALE MEAN, q^2)."""

    def predict(x, t):
        return Prediction(raw_output(kind, schedule, x, t, torch.full_like(x, SCALE * MEAN)), x, t, schedule, kind)

    return predict


def exact(schedule, x, t):
    """Where the teacher's ODE ends from x (B, 1) at times t (B,): a Gaussian is scaled and moved."""
    a, s = schedule.coefficients(t, x)
    return SCALE * MEAN + Q * (x - a * SCALE * MEAN) / (a**2 * Q**2 + s**2).sqrt()


def pairs_of(schedule, kind, noise, *, num_steps, points, solver="ddim"):
    timesteps, keep = trailing_timesteps(schedule, num_steps), list(range(0, num_steps, num_steps // points))
    path = follow(teacher(schedule, kind), noise, timesteps, solver=solver, keep=keep)
    return Trajectories(path.points, timesteps.times[keep], path.data, {"mean": torch.full_like(noise, MEAN)})


def noise_of(step, size=128):
    return torch.randn(size, 1, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


# -- the solver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_solvers_error_falls_with_its_steps(path):
    """The second order needs half the steps (its last step, to the data, is of first order, as in diffusers)."""
    kind, schedule = PATHS[path]
    noise, errors = noise_of(0), {}
    start = torch.full((len(noise),), schedule.t_max, dtype=torch.float64)
    for solver in ("ddim", "dpm++"):
        for num_steps in (25, 50, 100):
            made = pairs_of(schedule, kind, noise, num_steps=num_steps, points=1, solver=solver)
            errors[solver, num_steps] = (made.data - exact(schedule, noise, start)).square().mean().sqrt().item()
    print(path, errors)
    for num_steps in (25, 50):
        assert errors["ddim", num_steps] > 1.7 * errors["ddim", 2 * num_steps]
        assert errors["dpm++", num_steps] < 1.1 * errors["ddim", 2 * num_steps]
    assert errors["ddim", 25] < 0.06


def test_trajectory_points_are_the_starts_of_even_steps():
    kind, schedule = PATHS["eps"]
    made = pairs_of(schedule, kind, noise_of(0), num_steps=20, points=4)
    assert made.times.tolist() == trailing_timesteps(schedule, 4).times.tolist() == [999, 749, 499, 249]
    assert torch.equal(made.noise, noise_of(0))
    x, t = made.at(torch.tensor([0, 3] * 64))
    assert torch.equal(x[:2], torch.stack([made.points[0, 0], made.points[1, 3]]))
    assert t[:2].tolist() == [999, 249]


# -- closed form ------------------------------------------------------------------------------------------------------


def trained(path, *, num_steps, student_steps, broken=False):
    """A student trained on paths of `num_steps` steps; broken: the ends belong to other noises."""
    kind, schedule = PATHS[path]
    method = KD(KD.Config(num_inference_steps=student_steps), MethodSetup("full"))
    times = torch.tensor(method._times(schedule, student_steps), dtype=torch.float64)
    family = GaussianFamily(schedule, kind, times)
    pairs = pairs_of(schedule, kind, noise_of(0, 256), num_steps=num_steps, points=student_steps)
    pairs = replace(pairs, data=pairs.data.roll(1, 0)) if broken else pairs
    batch = Batch(None, pairs.cond, ("",) * 256, tuple(range(256)), trajectories=pairs)
    _, _, context = train(KD, method.config, family, lambda step: batch, num_steps=200, lr=5e-2)
    return context, times


def errors_of(context, times, path, *, num_steps):
    """RMS error of the student at each time it knows, at points of the teacher's paths: to their ends, to the ODE's."""
    kind, schedule = PATHS[path]
    made = pairs_of(schedule, kind, noise_of(10_000, 512), num_steps=num_steps, points=len(times))
    to_ends, to_exact = [], []
    for point, told in enumerate(times):
        x, at = made.at(torch.full((512,), point))
        with torch.no_grad():
            ours = context.predict("student", x, told.expand(512), made.cond).x0
        to_ends.append((ours - made.data).square().mean().sqrt().item())
        to_exact.append((ours - exact(schedule, x, at)).square().mean().sqrt().item())
    return to_ends, to_exact


@pytest.mark.parametrize(("path", "student_steps"), [*((path, STEPS) for path in PATHS), ("eps", 1), ("flow-shift", 1)])
def test_the_student_reaches_the_flow_map(path, student_steps):
    """It ends where the teacher's sampler does, so that what is left to the exact map is the solver's own error."""
    right, wrong = (
        errors_of(*trained(path, num_steps=80, student_steps=student_steps, broken=broken), path, num_steps=80)
        for broken in (False, True)
    )
    for point in range(student_steps):
        print(path, point, f"{right[0][point]:.1e} {right[1][point]:.1e}, wrong {wrong[1][point]:.1e}")
        assert right[0][point] < 0.02 * wrong[0][point], "the ends of the paths"
        assert right[1][point] < 0.1 * wrong[1][point], "the exact map, beside what a broken pairing leaves"


@pytest.mark.parametrize("schedule", [TABLE, FlowSchedule(shift=3.0)], ids=["table", "flow"])
def test_the_parametrisation_leaves_the_loss_unchanged(schedule):
    losses = []
    for kind in ("epsilon", "v_prediction", "sample", "flow"):
        if schedule.zero_terminal_snr and kind == "epsilon":
            continue  # no x0 of eps at the noisiest time: refused by what the method requires
        method = KD(KD.Config(num_inference_steps=STEPS), MethodSetup("full"))
        family = GaussianFamily(schedule, kind, trailing_timesteps(schedule, STEPS).times)
        pairs = pairs_of(schedule, "v_prediction", noise_of(0), num_steps=20, points=STEPS)
        batch = Batch(None, pairs.cond, ("",) * 128, tuple(range(128)), trajectories=pairs)
        _, _, context = train(KD, method.config, family, lambda step: batch, num_steps=0, lr=1.0)  # noqa: B023
        (update,) = method.updates(context.at(0, batch.positions), batch, 0)
        losses.append(update.loss.item())
    assert max(losses) - min(losses) <= 1e-9 * max(losses)


# -- the sampler ------------------------------------------------------------------------------------------------------


def test_the_sampler_visits_the_times_of_training():
    method = KD(KD.Config(num_inference_steps=4), MethodSetup("lora"))
    assert method.sampler(TABLE).call == {"timesteps": [999, 749, 499, 249]}
    assert method.sampler(TABLE, num_inference_steps=2).call == {"timesteps": [999, 499]}
    assert method.sampler(FlowSchedule(shift=3.0), num_inference_steps=2).call == {"sigmas": [1.0, 0.75]}
    with pytest.raises(UserError, match="8 inference steps: this student is trained at 4 times") as error:
        method.sampler(TABLE, num_inference_steps=8)
    assert "sample with 1 or 2 or 4" in error.value.remedy


def test_a_one_step_student_is_called_at_a_timestep_of_its_own():
    """The one that distribution matching tells its students of one step, so that it is a start for them."""

    def call(schedule, asked=None):
        config = KD.Config(num_inference_steps=1, one_step_time=asked)
        return KD(config, MethodSetup("lora")).sampler(schedule).call

    assert call(TABLE) == {"timesteps": [399]}
    assert call(TABLE, 999) == {"timesteps": [999]}
    assert call(FlowSchedule()) == {"sigmas": [1.0]}
    with pytest.raises(UserError, match="one_step_time = 1000, but the model has 1000 training timesteps"):
        call(TABLE, 1000)
    with pytest.raises(ValidationError, match="leave one_step_time out"):
        KD.Config(one_step_time=500, num_inference_steps=2)


def test_the_union_of_requirements_is_a_trajectory_that_serves_all_terms():
    needs = [Requirements(trajectory_points=points, images=False) for points in (0, 2, 3)]
    assert Requirements.union(needs) == Requirements(trajectory_points=6, images=False)
    assert Requirements.union(needs[:1]).trajectory_points == 0
