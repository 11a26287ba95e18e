"""Progressive distillation: its students make in one step what their teachers make in two, stage after stage."""

from itertools import pairwise

import pytest
import torch
from distill.core.diffusion import FlowSchedule, Prediction
from distill.core.diffusion.solvers import data_of_step, reach_of_step, step_to, trailing_timesteps
from distill.core.plugin_api.method import MethodSetup
from distill.core.testing.gaussian import Q, affine_of, gaussian_batch
from distill.core.testing.paths import NOISE as SDXL
from distill.core.testing.paths import PATHS, TABLE, ZERO_SNR, train
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.progressive import Progressive
from support.closed_form import GuidedFamily
from support.mixture import MixtureFamily, guided_parts, mixture_batch

MEAN, SCALE = 0.6, 2.0


def settings(*steps, **more):
    return Progressive.Config(student_steps=steps, **{"w_min": SCALE, "w_max": SCALE, **more})


# -- one step, and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_data_of_step_inverts_a_step(path):
    """A prediction of x0* jumps onto x_s exactly: between times, and to the data at the last step."""
    _, schedule = PATHS[path]
    timesteps = trailing_timesteps(schedule, 8)
    g = torch.Generator().manual_seed(0)
    x_t, x_s = (torch.randn(8, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    start, end = torch.arange(8), torch.arange(1, 9)
    x_0 = data_of_step(x_t, x_s, start=timesteps.at(start), end=timesteps.at(end))
    prediction = Prediction(x_0, x_t, timesteps.times, schedule, "sample")
    torch.testing.assert_close(step_to(prediction, timesteps.at(end)), x_s, rtol=1e-11, atol=1e-11)
    inner = Prediction(x_0[:-1], x_t[:-1], timesteps.times[:-1], schedule, "sample")
    torch.testing.assert_close(inner.ddim_step(timesteps.times[1:]), x_s[:-1], rtol=1e-11, atol=1e-11)
    assert torch.equal(x_0[-1], x_s[-1]), "the last step ends at the data: x0* is where the teacher ended"


def test_on_a_flow_the_target_is_the_average_velocity():
    schedule = FlowSchedule(shift=3.0)
    timesteps = trailing_timesteps(schedule, 4)
    g = torch.Generator().manual_seed(0)
    x_t, x_s = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    t, s = timesteps.sigma[:-1], timesteps.sigma[1:]
    x_0 = data_of_step(x_t, x_s, start=timesteps.at(torch.arange(4)), end=timesteps.at(torch.arange(1, 5)))
    velocity = Prediction(x_0, x_t, timesteps.times, schedule, "sample").as_type("flow")
    torch.testing.assert_close(velocity, (x_t - x_s) / (t - s)[:, None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_steps_of_one_prediction_give_that_prediction_as_target(k):
    """A teacher that says the same x0 and eps k times is copied as it is."""
    timesteps = trailing_timesteps(TABLE, 8)
    x_0, eps = torch.randn(2, 1, 6, dtype=torch.float64)
    x = [timesteps.alpha[j] * x_0 + timesteps.sigma[j] * eps for j in range(9)]
    for j in range(0, 8, k):
        at = [timesteps.at(torch.tensor([point])) for point in (j, j + k)]
        torch.testing.assert_close(data_of_step(x[j], x[j + k], start=at[0], end=at[1]), x_0, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", PATHS)
def test_the_reach_of_a_step_turns_the_error_of_x0_into_that_of_its_end(path):
    """SDXL-Lightning's squared error is that of x_s; where the step ends at the data it is that of x_0."""
    _, schedule = PATHS[path]
    timesteps, x = trailing_timesteps(schedule, 4), torch.randn(3, 4, 5, dtype=torch.float64)
    start, end = timesteps.at(torch.arange(4)), timesteps.at(torch.arange(1, 5))
    made = [step_to(Prediction(x_0, x[0], timesteps.times, schedule, "sample"), end) for x_0 in x[1:]]
    reach = reach_of_step(start=start, end=end)
    torch.testing.assert_close(made[1] - made[0], reach[:, None] * (x[2] - x[1]), rtol=1e-9, atol=1e-9)
    assert reach[-1] == 1


# -- the walk is the sampler's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 25, 16, 32, 3])
@pytest.mark.parametrize("schedule", [TABLE, ZERO_SNR], ids=["table", "zero-snr"])
def test_the_timestep_grid_is_that_of_diffusers_ddim(schedule, num_steps):
    from distill.model_families.calls.schedulers import build_scheduler

    method = Progressive(settings(4, 2), MethodSetup("lora"))
    sampler = method.sampler(schedule, num_inference_steps=num_steps)
    model = {
        "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_spacing": "leading",
        "steps_offset": 1, "rescale_betas_zero_snr": schedule.zero_terminal_snr, **SDXL,
    }  # fmt: skip
    scheduler = build_scheduler(model, sampler)
    scheduler.set_timesteps(num_steps)
    timesteps = trailing_timesteps(schedule, num_steps)
    assert scheduler.timesteps.tolist() == timesteps.times.tolist()
    assert scheduler.timesteps[0] == 999
    # DDIM goes on by T // N: the walk's next time where that is T / N, within a timestep of it elsewhere
    ends = [int(t) - 1000 // num_steps for t in scheduler.timesteps]
    off = [abs(end - t) for end, t in zip(ends, timesteps.times[1:].tolist(), strict=False)]
    if 1000 % num_steps:
        assert max(off) == 1
        return
    assert max(off, default=0) == 0
    g = torch.Generator().manual_seed(1)
    x = start = torch.randn(3, 4, 2, 2, generator=g, dtype=torch.float64)
    for j, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.tanh(x + j), t, x, return_dict=False)[0]
    ours = start
    for j, t in enumerate(timesteps.times):
        prediction = Prediction(torch.tanh(ours + j), ours, t.expand(3), schedule, "v_prediction")
        ours = step_to(prediction, timesteps.at(torch.tensor([j + 1] * 3)))
    torch.testing.assert_close(x, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_on_a_flow_the_sampler_visits_the_training_times(shift):
    from distill.model_families.calls.schedulers import build_scheduler

    schedule = FlowSchedule(shift=shift)
    method = Progressive(settings(4, 2), MethodSetup("lora"))
    sampler = method.sampler(schedule)
    model = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift, "num_train_timesteps": 1000}
    scheduler = build_scheduler(model, sampler)
    scheduler.set_timesteps(**sampler.call)
    timesteps = trailing_timesteps(schedule, 2)
    torch.testing.assert_close(scheduler.sigmas.double(), timesteps.sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.timesteps.double(), 1000 * timesteps.times, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [2, 3, 4, 5, 15])
def test_the_points_of_a_timestep_grid_are_every_kth_point_of_the_finer_grid(path, k):
    """Fractions of a half are rounded alike in both: 1000 - 1000 / 16 is 1000 - 15000 / 240."""
    _, schedule = PATHS[path]
    for num_steps in (48, 32, 16, 8, 4, 2, 1):
        coarse, fine = trailing_timesteps(schedule, num_steps), trailing_timesteps(schedule, k * num_steps)
        torch.testing.assert_close(coarse.times, fine.times[::k], rtol=0, atol=1e-15)
        torch.testing.assert_close(coarse.sigma, fine.sigma[::k], rtol=0, atol=1e-15)
        assert len(set(fine.times.tolist())) == k * num_steps
        assert fine.alpha[-1] == 1
        assert fine.sigma[-1] == 0
        assert fine.time_at(torch.tensor([0, k * num_steps])).tolist() == [fine.times[0], 0]


# -- closed form ------------------------------------------------------------------------------------------------------


def start_points(schedule, count=512):
    """What a sampler starts from."""
    return RngStreams(1, 0, tuple(range(count))).randn("start", (1,)).double()


def sample(predict, schedule, x, num_steps):
    """`num_steps` steps of the walk; `predict` makes a Prediction of (x, t)."""
    timesteps = trailing_timesteps(schedule, num_steps)
    for j, t in enumerate(timesteps.times):
        x = step_to(predict(x, t.expand(len(x))), timesteps.at(torch.full((len(x),), j + 1)))
    return x


def student_samples(context, schedule, num_steps, *, w=None):
    def predict(x, t):
        cond = {"mean": torch.full_like(x, MEAN)}
        told = None if w is None else torch.full((len(x),), w, dtype=torch.float64)
        with torch.no_grad():
            return context.predict("student", x, t, cond, guidance=told)

    return sample(predict, schedule, start_points(schedule), num_steps)


def gaussian_teacher(schedule, scale=SCALE):
    def predict(x, t):
        a, b = affine_of("sample", schedule, t)
        return Prediction(a[:, None] * x + b[:, None] * scale * MEAN, x, t, schedule, "sample")

    return predict


def exact_gaussian_end(schedule, scale=SCALE):
    """The guided probability-flow map of N(g c, q^2), from the start to the data."""
    timesteps = trailing_timesteps(schedule, 1)
    alpha, sigma = timesteps.alpha[0], timesteps.sigma[0]
    mean = scale * MEAN
    return mean + Q * (start_points(schedule) - alpha * mean) / (alpha**2 * Q**2 + sigma**2).sqrt()


def rms(x):
    return x.square().mean().sqrt().item()


def train_gaussian(path, steps, *, per_stage=150, **config):
    """The context of a run of these student_steps, and its schedule."""
    kind, schedule = PATHS[path]
    timesteps = trailing_timesteps(schedule, config.get("teacher_steps", 2 * steps[0]))
    family = GuidedFamily(schedule, kind, timesteps.times)
    _, _, context = train(
        Progressive, settings(*steps, **config), family, lambda step: gaussian_batch(step, 32, mean=MEAN),
        num_steps=per_stage * len(steps), lr=5e-2,
    )  # fmt: skip
    return context, schedule


DIVISIONS = {
    "halves": ((8, 4, 2), {}),
    "fourth-and-half": ((4, 2), {"teacher_steps": 16}),
    "third": ((2,), {"teacher_steps": 6}),
}


@pytest.mark.parametrize(
    ("path", "division"), [*((path, "halves") for path in PATHS), ("eps", "fourth-and-half"), ("flow-shift", "third")]
)
def test_the_student_composes_the_finer_steps_of_the_guided_teacher(path, division):
    """Two steps of the student of the last stage are all of the teacher's: the fixed point of its discretisation.

    The wrong target, one big step of the teacher where it should make several, would leave it with the teacher's own
    two.
    """
    steps, more = DIVISIONS[division]
    num_teacher_steps = more.get("teacher_steps", 2 * steps[0])
    context, schedule = train_gaussian(path, steps, **more)
    start = start_points(schedule)
    exact, wrong = (sample(gaussian_teacher(schedule), schedule, start, number) for number in (num_teacher_steps, 2))
    error = rms(student_samples(context, schedule, 2) - exact)
    print(f"{path}: right {error:.2e} wrong {rms(wrong - exact):.2e}")
    assert error <= 0.01 * rms(wrong - exact)


@pytest.mark.parametrize("path", ["eps", "flow-shift"])
def test_a_finer_first_teacher_brings_the_student_nearer_to_the_ode(path):
    errors = []
    for steps in [(2,), (4, 2), (8, 4, 2)]:
        context, schedule = train_gaussian(path, steps)
        errors.append(rms(student_samples(context, schedule, 2) - exact_gaussian_end(schedule)))
    print(path, errors)
    assert all(finer < 0.65 * coarser for coarser, finer in pairwise(errors))


@pytest.mark.parametrize("path", ["v", "flow"])
def test_a_student_that_takes_w_composes_the_steps_at_every_guidance(path):
    """Full training over a range: one student, each of its scales the eight steps of the teacher at that scale."""
    context, schedule = train_gaussian(path, (4, 2), per_stage=500, w_min=1.0, w_max=4.0)
    start = start_points(schedule)
    for scale in (1.2, 2.0, 3.8):
        exact, wrong = (sample(gaussian_teacher(schedule, scale), schedule, start, n) for n in (8, 2))
        error = rms(student_samples(context, schedule, 2, w=scale - 1) - exact)
        print(f"{path} scale={scale}: right {error:.2e} wrong {rms(wrong - exact):.2e}")
        assert error <= 0.02 * rms(wrong - exact)


@pytest.mark.parametrize("path", ["eps", "flow-shift"])
def test_on_a_mixture_the_student_composes_the_finer_steps(path):
    kind, schedule = PATHS[path]
    family = MixtureFamily(schedule, kind, trailing_timesteps(schedule, 8).times, prompts=(MEAN,))
    _, _, context = train(
        Progressive, settings(4, 2), family, lambda step: mixture_batch(step, 256, mean=MEAN),
        num_steps=300, lr=0.1,
    )  # fmt: skip

    def teacher(x, t):
        x_0, _ = guided_parts(*schedule.coefficients(t, x), x, torch.full_like(x, MEAN), SCALE)
        return Prediction(x_0, x, t, schedule, "sample")

    start = start_points(schedule)
    exact, wrong = (sample(teacher, schedule, start, num_steps) for num_steps in (8, 2))
    error = rms(student_samples(context, schedule, 2) - exact)
    print(f"{path}: right {error:.2e} wrong {rms(wrong - exact):.2e}")
    assert error <= 0.1 * rms(wrong - exact)
