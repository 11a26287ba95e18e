"""A TCD student trained by the engine reaches the fixed point of its s-averaged objective, in segments and without.

One prediction per (x_t, t) serves every target time s, so the fixed point is a least-squares average over s, known
exactly where the teacher is: tests/support/trajectory.py solves it, index by index. Where a segment is one step of the
grid there is a single s, and the student must be the teacher's DDIM step itself.
"""

from unittest.mock import patch

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, TCDScheduler
from distill.core.diffusion import DDPMSchedule, FlowSchedule
from distill.core.diffusion.segments import even_times, renoise, segment_edge
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.errors import UserError
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.method import MethodSetup
from distill.core.plugin_api.stage import Stage
from distill.core.testing.gaussian import GaussianFamily, denoise, gaussian_batch
from distill.core.testing.rng import BatchedRngStreams
from distill.distill_methods import tcd
from distill.distill_methods.tcd import TCD, stage_lengths
from pydantic import ValidationError
from support import mixture
from support.trajectory import edges, fixed_x_0, move

SCALE, MEAN = 2.0, 0.6
SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDPM = DDPMSchedule.from_config(SDXL)
SCHEDULES = {
    "eps": ("epsilon", DDPM),
    "v": ("v_prediction", DDPM),
    "v-zero-snr": ("v_prediction", DDPMSchedule.from_config({**SDXL, "rescale_betas_zero_snr": True})),
    "x0": ("sample", DDPM),
    "flow": ("flow", FlowSchedule(shift=1.0)),
    "flow-shift": ("flow", FlowSchedule(shift=3.0)),
}


def family_of(name, num_steps, *, mixed=False):
    kind, schedule = SCHEDULES[name]
    grid = schedule.grid(num_steps)
    times = torch.cat([grid.previous[:1], grid.times])
    if mixed:
        return mixture.MixtureFamily(schedule, kind, times, prompts=(MEAN,))
    return GaussianFamily(schedule, kind, times)


def guided_teacher(schedule, *, mixed=False):
    """The guided x_0 in closed form."""

    def x_0(x, t):
        c = torch.full_like(x, MEAN)
        if mixed:
            return mixture.guided_parts(*schedule.coefficients(t, x), x, c, SCALE)[0]
        uncond = denoise(schedule, x, t, torch.zeros_like(c))
        return uncond + SCALE * (denoise(schedule, x, t, c) - uncond)

    return x_0


def student_context(family, *, stages=(), **settings):
    config = TCD.Config(**{"w_min": SCALE, "w_max": SCALE, "num_inference_steps": 1, **settings})
    method = TCD(config, MethodSetup("full", prediction_type=family.prediction_type))
    networks = Networks(family, method.roles(config, method.setup), lora=None, seed=0, parameter_dtype=torch.float64)
    return method, networks, Context(Runtime(family, networks, 0, torch.device("cpu"), stages=stages))


def optimizer_of(networks, role, *, lr, steps=1):
    parameters = networks.parameters(role)
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    decay = lambda s: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())  # noqa: E731
    return RoleOptimizer(adam, parameters, learning_rate=lr, schedule=decay, max_grad_norm=0)


def train(family, *, steps, make_batch, lr=3e-2, size=256, **settings):
    method, networks, context = student_context(family, **settings)
    before = {key: value.clone() for key, value in networks.base.state_dict().items()}
    optimizers = {role: optimizer_of(networks, role, lr=lr, steps=steps) for role in networks.trained_roles()}
    loop = Loop(method, context, networks, optimizers, health=HealthMonitor(1))
    with patch("distill.core.plugin_api.context.RngStreams", BatchedRngStreams):
        for step in range(steps):
            loop.step(step, [make_batch(step, size, mean=MEAN)])
    assert all(torch.equal(value, before[key]) for key, value in networks.base.state_dict().items()), "teacher moved"
    return method, family, networks


def steps_taken(method, family, networks, x, index):
    """The student's x_0 at grid index `index`."""
    schedule = family.schedule
    t = schedule.grid(method.config.num_ddim_timesteps).times[index]
    context = Context(Runtime(family, networks, 0, torch.device("cpu")))
    with torch.no_grad():
        return context.predict(method.result_role(), x, t.expand(len(x)), {"mean": torch.full_like(x, MEAN)}).x0


def errors(trained, teacher, *, num_segments, make_batch):
    """RMS of J_{t -> s} to the fixed point's over all pairs (t, s) inside a segment: the student's, the wrong one's."""
    method, family, _ = trained
    schedule, num_steps = family.schedule, method.config.num_ddim_timesteps
    grid, x_0 = schedule.grid(num_steps), make_batch(10**6, 512, mean=MEAN).latents
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    how = {"num_steps": num_steps, "num_segments": num_segments}
    right, wrong = [], []
    for i, t in enumerate(grid.times):
        x = schedule.add_noise(x_0, eps, t.expand(len(x_0)))
        exact, mistaken = (fixed_x_0(teacher, schedule, x, i, wrong=flag, **how) for flag in (False, True))
        ours = steps_taken(*trained, x, i)
        for j in range(max(edge for edge in edges(num_steps, num_segments) if edge <= i), i + 1):
            ends = [move(schedule, x, part, t, grid.previous[j]) for part in (ours, exact, mistaken)]
            right.append((ends[0] - ends[1]).square().mean())
            wrong.append((ends[2] - ends[1]).square().mean())
    return torch.stack(right).mean().sqrt().item(), torch.stack(wrong).mean().sqrt().item()


# -- closed form ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_gaussian_student_reaches_the_fixed_point(name):
    family = family_of(name, 6)
    trained = train(family, steps=300, make_batch=gaussian_batch, num_ddim_timesteps=6)
    right, wrong = errors(trained, guided_teacher(family.schedule), num_segments=1, make_batch=gaussian_batch)
    print(f"{name}: right {right:.1e} wrong {wrong:.1e}")
    assert right <= 0.1 * wrong


@pytest.mark.parametrize(("num_steps", "num_segments"), [(6, 2), (7, 3)])
def test_targets_stay_inside_their_segment(num_steps, num_segments):
    family = family_of("eps", num_steps)
    trained = train(
        family, steps=300, make_batch=gaussian_batch, num_ddim_timesteps=num_steps, segments=[num_segments],
        num_inference_steps=num_segments,
    )  # fmt: skip
    teacher = guided_teacher(family.schedule)
    right, wrong = errors(trained, teacher, num_segments=num_segments, make_batch=gaussian_batch)
    unsegmented, _ = errors(trained, teacher, num_segments=1, make_batch=gaussian_batch)
    print(f"{num_segments} of {num_steps}: right {right:.1e} wrong {wrong:.1e} without segments {unsegmented:.1e}")
    assert right <= 0.1 * wrong
    assert right <= 0.1 * unsegmented


@pytest.mark.parametrize("name", ["eps", "flow-shift"])
def test_segments_of_one_step_are_the_teachers_ddim_steps(name):
    family = family_of(name, 5)
    trained = train(
        family, steps=300, make_batch=gaussian_batch, num_ddim_timesteps=5, segments=[5], num_inference_steps=5
    )
    schedule, teacher = family.schedule, guided_teacher(family.schedule)
    ours = exact = torch.randn(256, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    untrained = ours
    grid = schedule.grid(5)
    for i in reversed(range(5)):
        t, s = grid.times[i], grid.previous[i]
        plain = denoise(schedule, untrained, t.expand(256), torch.full_like(untrained, MEAN))
        ours, untrained = (
            move(schedule, ours, steps_taken(*trained, ours, i), t, s),
            move(schedule, untrained, plain, t, s),
        )
        exact = move(schedule, exact, teacher(exact, t.expand(256)), t, s)
    right, before = ((x - exact).square().mean().sqrt() for x in (ours, untrained))
    assert right <= 0.01 * before


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_a_mixture_student_reaches_the_fixed_point(name):
    family = family_of(name, 4, mixed=True)
    trained = train(family, steps=900, make_batch=mixture.mixture_batch, lr=5e-2, size=1024, num_ddim_timesteps=4)
    teacher = guided_teacher(family.schedule, mixed=True)
    right, wrong = errors(trained, teacher, num_segments=1, make_batch=mixture.mixture_batch)
    print(f"{name}: right {right:.1e} wrong {wrong:.1e}")
    assert right <= 0.1 * wrong


@pytest.mark.parametrize("name", ["eps", "flow", "flow-shift"])
def test_the_fixed_points_error_falls_with_the_grid_and_with_the_segments(name):
    """K steps of a student of K segments against the exact guided flow of the mixture."""
    _, schedule = SCHEDULES[name]
    teacher = guided_teacher(schedule, mixed=True)

    def error(num_steps, num_segments):
        grid = schedule.grid(num_steps)
        noise = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start = x = noise * schedule.sigma(grid.times[-1])
        points = [*reversed(edges(num_steps, num_segments))]
        for upper, lower in zip([num_steps, *points], points, strict=False):
            x_0 = fixed_x_0(teacher, schedule, x, upper - 1, num_steps=num_steps, num_segments=num_segments)
            x = move(schedule, x, x_0, grid.times[upper - 1], grid.previous[lower])
        ends = (grid.times[-1].expand(400), grid.previous[0].expand(400))
        exact = mixture.ode_map(schedule, start, *ends, torch.full_like(x, MEAN), scale=SCALE, num_steps=100)
        return (x - exact).square().mean().sqrt().item()

    by_grid = [error(num_steps, 4) for num_steps in (8, 16, 40)]
    by_segments = [error(40, num_segments) for num_segments in (1, 2, 4, 8)]
    print(name, by_grid, by_segments)
    assert by_grid == sorted(by_grid, reverse=True)
    assert by_segments == sorted(by_segments, reverse=True)
    assert by_segments[-1] < by_segments[0] / 2


def test_partial_renoising_suits_a_student_of_one_segment_best():
    """The fixed point sampled with gamma 0, 0.3 and 1: Wasserstein-1 distance to the teacher's exact distribution."""
    teacher, grid, size = guided_teacher(DDPM, mixed=True), DDPM.grid(40), 4000
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(size, 1, generator=draw, dtype=torch.float64) * DDPM.sigma(grid.times[-1])
    ends = (grid.times[-1].expand(size), grid.previous[0].expand(size))
    exact = mixture.ode_map(DDPM, start, *ends, torch.full_like(start, MEAN), scale=SCALE, num_steps=60)
    for num_steps in (4, 8):
        stops = [39 - j * 40 // num_steps for j in range(num_steps)]
        found = {}
        for eta in (0.0, 0.3, 1.0):
            x = start
            for stop, following in zip(stops, [*stops[1:], None], strict=True):
                end = grid.previous[0] if following is None else grid.times[following]
                s = ((1 - eta) * end).floor().long()
                x = move(DDPM, x, fixed_x_0(teacher, DDPM, x, stop, num_steps=40), grid.times[stop], s)
                noise = torch.randn(size, 1, generator=draw, dtype=torch.float64)
                x = renoise(DDPM, x, s.expand(size), end.expand(size), noise)
            found[eta] = (x.sort(0).values - exact.sort(0).values).abs().mean().item()
        print(num_steps, found)
        assert found[0.3] < found[0.0] < found[1.0]


# -- times, segments, stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "num_segments"), [(50, 8), (50, 4), (50, 1), (7, 3), (10, 10), (1000, 6)])
def test_segments_begin_at_the_times_of_as_many_sampler_steps(num_steps, num_segments):
    found = segment_edge(torch.arange(num_steps), num_steps=num_steps, num_segments=num_segments)
    assert found.unique().tolist() == edges(num_steps, num_segments)
    scheduler = TCDScheduler(original_inference_steps=num_steps)
    scheduler.set_timesteps(num_segments)
    grid = DDPM.grid(num_steps)
    stops = [*scheduler.timesteps.tolist()[1:], int(grid.previous[0])]
    assert stops == [int(grid.previous[edge]) for edge in reversed(edges(num_steps, num_segments))]
    assert even_times(DDPM, num_steps=num_segments, num_grid_steps=num_steps) == scheduler.timesteps.tolist()


def seen_times(monkeypatch, *, num_steps, stages, steps, **settings):
    """(step, t, t', s) of every sample, as the loss is computed from them."""
    family = family_of("eps", num_steps)
    method, _, context = student_context(family, stages=stages, num_ddim_timesteps=num_steps, **settings)
    calls = []
    real = tcd.trajectory_function
    monkeypatch.setattr(tcd, "trajectory_function", lambda p, s: calls.append((p.t, s)) or real(p, s))
    rows = []
    for step in steps:
        calls.clear()
        batch = gaussian_batch(step, 600, mean=MEAN)
        list(method.updates(context.at(step, batch.positions), batch, step))
        (t_prev, s_target), (t, s) = calls
        assert torch.equal(s_target, s), "student and target jump to the same time"
        rows += [(step, *row) for row in zip(t.tolist(), t_prev.tolist(), s.tolist(), strict=True)]
    return rows


def test_target_times_are_uniform_below_the_previous_time(monkeypatch):
    rows = seen_times(monkeypatch, num_steps=4, stages=(), steps=range(4))
    grid = DDPM.grid(4)
    for i, (t, t_prev) in enumerate(zip(grid.times.tolist(), grid.previous.tolist(), strict=True)):
        own = [s for _, time, previous, s in rows if time == t and previous == t_prev]
        counts = torch.tensor([own.count(s) for s in grid.previous[: i + 1].tolist()])
        assert counts.sum() == len(own), "s is a point of the grid, not above t'"
        assert (counts - len(own) / (i + 1)).abs().max() < 5 * (len(own) / (i + 1)) ** 0.5


def test_segments_change_at_the_first_step_of_each_stage(monkeypatch):
    config = TCD.Config(num_ddim_timesteps=8, segments=[4, 2, 1])
    stages = TCD.stages(config, total_steps=7)
    assert [stage.num_steps for stage in stages] == [2, 3, 2]
    rows = seen_times(monkeypatch, num_steps=8, stages=stages, steps=range(7), segments=[4, 2, 1])
    points = [int(DDPM.grid(8).previous[0]), *DDPM.grid(8).times.tolist()]
    for step, number in enumerate([4, 4, 2, 2, 2, 1, 1]):
        own = [(points.index(t, 1) - 1, points.index(s)) for at, t, _, s in rows if at == step]
        below = {i: min(j for index, j in own if index == i) for i in range(8)}
        assert below == {i: i // (8 // number) * (8 // number) for i in range(8)}


def test_stage_lengths_fill_the_run_and_follow_their_shares():
    assert stage_lengths(10, [1] * 4) == [2, 3, 3, 2]
    assert stage_lengths(1000, [4, 3, 2, 1]) == [400, 300, 200, 100]
    for total in range(4, 60):
        lengths = stage_lengths(total, [1.0] * 4)
        assert sum(lengths) == total
        assert max(lengths) - min(lengths) <= 1
    with pytest.raises(UserError, match="stage 1 of 4"):
        stage_lengths(3, [0.1, 1, 1, 1])
    names = [stage.name for stage in TCD.stages(TCD.Config(segments=[8, 1]), total_steps=4)]
    assert names == ["8 segments", "1 segment"]


def test_weights_follow_the_stage_or_the_step():
    family = family_of("eps", 8, mixed=True)
    stages = [Stage("a", 2), Stage("b", 2)]
    batch = mixture.mixture_batch(0, 16, mean=MEAN)

    def updates(step, **settings):
        settings = {"num_ddim_timesteps": 8, "segments": [2, 1], **settings}
        method, _, context = student_context(family, stages=stages, **settings)
        return list(method.updates(context.at(step, batch.positions), batch, step))

    full = [updates(step)[0].loss.item() for step in range(4)]
    listed = [updates(step, consistency_weight=[1.0, 0.25])[0].loss.item() for step in range(4)]
    assert listed == pytest.approx([full[0], full[1], full[2] / 4, full[3] / 4])
    ramped = [updates(step, consistency_weight={"0": 1, "2": 0.5})[0].loss.item() for step in range(3)]
    assert ramped == pytest.approx([full[0], full[1] * 0.75, full[2] / 2])
    roles = [[u.role for u in updates(step, adversarial_weight=[0.0, 0.5])] for step in range(4)]
    assert roles == [["student"]] * 2 + [["student", "discriminator"]] * 2


def test_adversarial_updates_move_only_their_own_role():
    for still in ("student", "discriminator"):
        family = family_of("eps", 4, mixed=True)
        settings = {"num_ddim_timesteps": 4, "adversarial_weight": 0.5}
        method, networks, context = student_context(family, **settings)
        optimizers = {
            role: optimizer_of(networks, role, lr=0.0 if role == still else 1e-3) for role in networks.trained_roles()
        }
        before = {
            role: [p.clone() for p in networks.module(role).parameters()]
            for role in ("teacher", "student", "discriminator")
        }
        loop = Loop(method, context, networks, optimizers, health=HealthMonitor(1))
        loop.step(0, [mixture.mixture_batch(0, 32, mean=MEAN)])
        for role, weights in before.items():
            same = [torch.equal(p, q) for p, q in zip(networks.module(role).parameters(), weights, strict=True)]
            assert all(same) == (role in ("teacher", still)), (role, still)


# -- sampler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_the_sampler_is_strategic_stochastic_sampling_on_the_training_grid(eta, num_steps):
    method = TCD(TCD.Config(num_ddim_timesteps=50, eta=eta), MethodSetup("lora"))
    sampler = method.sampler(DDPM, num_inference_steps=num_steps)
    assert sampler.scheduler == "TCDScheduler"
    scheduler = TCDScheduler.from_config({**SDXL, **sampler.config})
    scheduler.set_timesteps(sampler.num_inference_steps)
    times = even_times(DDPM, num_steps=num_steps, num_grid_steps=50)
    assert scheduler.timesteps.tolist() == times
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    theirs = ours = torch.randn(64, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = torch.full_like(ours, MEAN)
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        t, following = torch.tensor(int(t)), torch.tensor(int(following))
        alpha, sigma = DDPM.alpha(t), DDPM.sigma(t)
        _, eps = mixture.parts(alpha, sigma, theirs, c)
        theirs = scheduler.step(eps, t, theirs, generator=generators[0], **sampler.call).prev_sample
        # algorithm 4: to s = floor((1 - gamma) t_n), then up again to t_n, the last step without noise
        s = ((1 - eta) * following).floor().long()
        x_s = move(DDPM, ours, mixture.parts(alpha, sigma, ours, c)[0], t, s)
        if eta == 0 or following == 0:
            ours = x_s
        else:
            noise = torch.randn(64, 1, generator=generators[1], dtype=torch.float64)
            ours = renoise(DDPM, x_s, s.expand(64), following.expand(64), noise)
        torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-4)  # the scheduler's table is float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_sampler_on_a_flow(shift, eta):
    schedule = FlowSchedule(shift=shift)
    method = TCD(TCD.Config(num_ddim_timesteps=20, eta=eta), MethodSetup("lora", prediction_type="flow"))
    sampler = method.sampler(schedule, num_inference_steps=3)
    assert sampler.scheduler == "FlowMatchEulerDiscreteScheduler"
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({"shift": shift, **sampler.config})
    scheduler.set_timesteps(**sampler.call)
    times = even_times(schedule, num_steps=3, num_grid_steps=20)
    assert scheduler.sigmas.tolist() == pytest.approx([*times, 0.0])
    x = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        x_0, eps = mixture.parts(torch.tensor(1 - t), torch.tensor(t), x.double(), torch.zeros(8, 1).double())
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        stepped = scheduler.step((eps - x_0).float(), torch.tensor(1000 * t), x, generator=generators[0]).prev_sample
        noise = torch.randn(8, 1, generator=generators[1]) if eta == 1 else eps
        torch.testing.assert_close(stepped, ((1 - following) * x_0 + following * noise).float(), rtol=1e-4, atol=1e-4)
        x = stepped


def test_noise_added_in_two_parts_is_noise_added_at_once():
    for schedule, s, u in [(DDPM, 199, 699), (FlowSchedule(3.0), 0.2, 0.7)]:
        s, u = torch.tensor([s]), torch.tensor([u])
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        alpha_s, sigma_s = schedule.coefficients(s, one)
        alpha_u, sigma_u = schedule.coefficients(u, one)
        kept, added = renoise(schedule, one, s, u, zero), renoise(schedule, zero, s, u, one)
        torch.testing.assert_close(kept * alpha_s, alpha_u)
        torch.testing.assert_close((kept * sigma_s) ** 2 + added**2, sigma_u**2)
        assert torch.equal(renoise(schedule, one, s, s, one), one)


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"w_min": 9, "w_max": 3}, "w_min = 9.0 is above w_max"),
        ({"num_inference_steps": 60}, "above num_ddim_timesteps = 50"),
        ({"segments": [4, 8]}, "must fall"),
        ({"segments": [2, 2]}, "must fall"),
        ({"segments": [64, 1]}, "do not fit a grid"),
        ({"segments": []}, "at least 1 item"),
        ({"segments": [8]}, "below the 8 segments of the last stage"),
        ({"segments": [8, 4, 2, 1], "stage_shares": [1, 2]}, "stage_shares = .* has 2 numbers for 4 stages"),
        ({"adversarial_weight": [0, 1]}, "adversarial_weight = .* has 2 numbers for 1 stage"),
        ({"consistency_weight": 0}, "nothing would be trained"),
        ({"eta": 1.5}, "less than or equal to 1"),
        ({"segment": [8, 1]}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, said):
    with pytest.raises(ValidationError, match=said):
        TCD.Config(**settings)


def test_partial_renoising_is_refused_on_a_flow_before_training():
    with pytest.raises(UserError, match=r"tcd\.eta = 0\.3"):
        TCD(TCD.Config(eta=0.3), MethodSetup("lora", prediction_type="flow"))
    flow = TCD(TCD.Config(), MethodSetup("lora", prediction_type="flow")).sampler(FlowSchedule())
    assert flow.config["stochastic_sampling"] is False
    assert TCD(TCD.Config(), MethodSetup("lora")).sampler(DDPM).call == {"eta": 0.3}


def test_snapped_segment_edges_are_reported():
    lines = TCD(TCD.Config(segments=[4, 2, 1]), MethodSetup("lora")).notices()
    assert [line for line in lines if "snapped" in line] == [
        "tcd: 4 segments do not divide num_ddim_timesteps = 50 evenly; "
        "their edges are snapped to the grid's points 0, 13, 25, 38"
    ]
