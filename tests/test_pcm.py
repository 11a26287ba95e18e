"""A PCM student trained by the engine reaches the fixed point of its discretisation in every phase; samplers; settings.

The fixed point at grid index i is the product of the guided teacher's DDIM maps i, i - 1, ... down to the edge of i's
phase, known exactly for Gaussian and mixture data. Two wrong targets are measured beside it: the teacher's own jump,
and a student that is trained towards the end of the trajectory instead of the edge.
"""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, TCDScheduler
from distill.core.config.requirements import check_requirements
from distill.core.diffusion import FlowSchedule
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.errors import UserError
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.method import MethodSetup
from distill.core.settings.run_settings import RunSettings
from distill.core.testing.gaussian import GaussianFamily, Q, denoise, gaussian_batch
from distill.core.testing.paths import NOISE as SDXL
from distill.core.testing.paths import PATHS, TABLE
from distill.distill_methods import pcm
from distill.distill_methods.pcm import PCM, phase_of
from pydantic import ValidationError
from support import mixture
from support.trajectory import move

SCALE, MEAN = 2.0, 0.6
PLAIN = {"adversarial_weight": 0, "loss_type": "l2", "w_min": SCALE, "w_max": SCALE}


def family_of(name, num_steps, *, mixed=False):
    kind, schedule = PATHS[name]
    grid = schedule.grid(num_steps)
    times = torch.cat([grid.previous[:1], grid.times])
    if mixed:
        return mixture.MixtureFamily(schedule, kind, times, prompts=(MEAN,))
    return GaussianFamily(schedule, kind, times)


def make(family, **settings):
    method = PCM(PCM.Config(**{**PLAIN, **settings}), MethodSetup("full", prediction_type=family.prediction_type))
    roles = method.roles(method.config, method.setup)
    networks = Networks(family, roles, lora=None, seed=0, parameter_dtype=torch.float64)
    return method, networks, Context(Runtime(family, networks, seed=0, device=torch.device("cpu")))


def optimizer_of(networks, role, *, lr, steps=1):
    parameters = networks.parameters(role)
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    decay = lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))  # noqa: E731
    return RoleOptimizer(adam, parameters, learning_rate=lr, schedule=decay, max_grad_norm=0)


def train(family, *, steps, make_batch=gaussian_batch, lr=3e-2, size=32, **settings):
    """(method, networks, context) after training; the teacher is bitwise what it was."""
    method, networks, context = make(family, **settings)
    before = {key: value.clone() for key, value in networks.base.state_dict().items()}
    rates = {"student": lr, "discriminator": 1e-3}
    optimizers = {role: optimizer_of(networks, role, lr=rates[role], steps=steps) for role in networks.trained_roles()}
    loop = Loop(method, context, networks, optimizers, health=HealthMonitor(1))
    for step in range(steps):
        loop.step(step, [make_batch(step, size, mean=MEAN)])
    assert all(torch.equal(value, before[key]) for key, value in networks.base.state_dict().items()), "teacher moved"
    return method, networks, context


def teacher_of(schedule, *, mixed=False, scale=SCALE, c=MEAN):
    """The guided x_0 in closed form."""

    def x_0(x, t):
        prompt = torch.full_like(x, c)
        if mixed:
            return mixture.guided_parts(*schedule.coefficients(t, x), x, prompt, scale)[0]
        uncond = denoise(schedule, x, t, torch.zeros_like(prompt))
        return uncond + scale * (denoise(schedule, x, t, prompt) - uncond)

    return x_0


def edge_of(index, num_steps, num_phases):
    """The step that index's phase ends with, from its definition with real numbers."""
    edges = [math.ceil(m * num_steps / num_phases - 1e-9) for m in range(num_phases)]
    return max(edge for edge in edges if edge <= index)


def walk(teacher, schedule, x, index, edge, num_steps):
    """The product of the teacher's DDIM maps from grid index `index` down to where step `edge` ends."""
    grid = schedule.grid(num_steps)
    for j in range(index, edge - 1, -1):
        x = move(schedule, x, teacher(x, grid.times[j].expand(len(x))), grid.times[j], grid.previous[j])
    return x


def ddim_step(trained, x, index, edge, *, c=MEAN):
    """The student's J from grid index `index` to where step `edge` ends."""
    method, networks, context = trained
    grid = context.schedule.grid(method.config.num_ddim_timesteps)
    t, cond = grid.times[index].expand(len(x)), {"mean": torch.full_like(x, c)}
    with torch.no_grad():
        return context.predict(method.result_role(), x, t, cond).ddim_step(grid.previous[edge].expand(len(x)))


def errors(trained, teacher, *, make_batch=gaussian_batch, c=MEAN):
    """RMS over all times and noised data of J_{t -> s} to the fixed point's: ours, the teacher's, and of target 0.

    The outermost hundredth on either side is left out: a table knows nothing where no data came.
    """
    method, _, context = trained
    schedule, num_steps = context.schedule, method.config.num_ddim_timesteps
    grid, x_0 = schedule.grid(num_steps), make_batch(10**6, 512, mean=MEAN).latents
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for i, t in enumerate(grid.times):
        edge = edge_of(i, num_steps, method.config.num_phases)
        s, end = grid.previous[edge], grid.previous[0]
        x = schedule.add_noise(x_0, eps, t.expand(len(x_0))).sort(0).values[5:-5]
        exact = walk(teacher, schedule, x, i, edge, num_steps)
        x_prev = walk(teacher, schedule, x, i, i, num_steps)
        from_teacher = x_prev
        if i > edge:
            t_prev = grid.previous[i]
            from_teacher = move(schedule, x_prev, teacher(x_prev, t_prev.expand(len(x))), t_prev, s)
        # the x_0 whose jump to the end of the trajectory is right, used for a jump to the edge
        ratio = schedule.sigma(end) / schedule.sigma(t)
        at_end = walk(teacher, schedule, x, i, 0, num_steps)
        to_end = move(schedule, x, (at_end - ratio * x) / (schedule.alpha(end) - ratio * schedule.alpha(t)), t, s)
        ours = ddim_step(trained, x, i, edge, c=c)
        found.append([(part - exact).square().mean() for part in (ours, from_teacher, to_end)])
    return torch.tensor(found).mean(0).sqrt().tolist()


def sample(trained, x, num_steps):
    """The sampler's own steps, on the times that it names."""
    method, _, context = trained
    times = pcm.even_times(context.schedule, num_steps=num_steps, num_grid_steps=method.config.num_ddim_timesteps)
    grid = context.schedule.grid(method.config.num_ddim_timesteps)
    ends = [*times[1:], float(grid.previous[0])]
    for t, u in zip(times, ends, strict=True):
        index, end = ((grid.times - t).abs().argmin(), (grid.previous - u).abs().argmin())
        x = ddim_step(trained, x, index, end)
    return x


# -- closed form ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_a_gaussian_student_reaches_the_fixed_point_of_every_phase(name):
    trained = train(family_of(name, 8), steps=300, num_ddim_timesteps=8, num_phases=2)
    right, teachers, to_zero = errors(trained, teacher_of(trained[2].schedule))
    print(f"{name}: right {right:.1e} teacher {teachers:.1e} target at 0 {to_zero:.1e}")
    assert right <= 0.1 * min(teachers, to_zero)


@pytest.mark.parametrize(("name", "settings"), [("v", {}), ("flow-shift", {"loss_type": "huber"})])
def test_a_mixture_student_reaches_the_fixed_point_of_every_phase(name, settings):
    family, batches = family_of(name, 6, mixed=True), mixture.mixture_batch
    trained = train(
        family, steps=350, make_batch=batches, lr=1e-1, size=96, num_ddim_timesteps=6, num_phases=2, **settings
    )
    right, teachers, to_zero = errors(trained, teacher_of(family.schedule, mixed=True), make_batch=batches)
    print(f"{name}: right {right:.1e} teacher {teachers:.1e} target at 0 {to_zero:.1e}")
    assert right <= 0.1 * min(teachers, to_zero)


def exact_flow(schedule, x, t, u, *, mixed):
    """The guided teacher's probability flow from `t` to `u`, one time each."""
    if mixed:
        ends = (t.expand(len(x)), u.expand(len(x)))
        return mixture.ode_map(schedule, x, *ends, torch.full_like(x, MEAN), scale=SCALE, num_steps=100)
    (a, s), (a_u, s_u) = (schedule.coefficients(time[None], x) for time in (t, u))
    spread = ((a_u**2 * Q**2 + s_u**2) / (a**2 * Q**2 + s**2)).sqrt()
    return a_u * SCALE * MEAN + spread * (x - a * SCALE * MEAN)


@pytest.mark.parametrize(("name", "mixed"), [("eps", False), ("flow-shift", False), ("flow", True)])
def test_samples_approach_the_exact_flow_as_the_grid_grows(name, mixed):
    schedule, found = PATHS[name][1], []
    how = {"make_batch": mixture.mixture_batch, "lr": 1e-1, "size": 96} if mixed else {}
    for num_steps in (4, 12) if mixed else (4, 8, 16):
        family = family_of(name, num_steps, mixed=mixed)
        trained = train(family, steps=250, num_ddim_timesteps=num_steps, num_phases=2, **how)
        grid = schedule.grid(num_steps)
        noise = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        exact = exact_flow(schedule, noise, grid.times[-1], grid.previous[0], mixed=mixed)
        found.append((sample(trained, noise, 2) - exact).square().mean().sqrt().item())
    print(name, mixed, found)
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.6 * found[0]


@pytest.mark.parametrize("c", [MEAN, 0.0])
def test_an_unguided_student_keeps_its_predictions_with_and_without_the_prompt(c):
    """What it says with and without the prompt are the unguided teacher's, phase by phase."""
    trained = train(
        family_of("eps", 8), steps=500, num_ddim_timesteps=8, num_phases=2, cfg_free=True, empty_prompt_share=0.5
    )
    right, teachers, to_zero = errors(trained, teacher_of(TABLE, scale=1.0, c=c), c=c)
    print(f"{c}: right {right:.1e} teacher {teachers:.1e} target at 0 {to_zero:.1e}")
    assert right <= 0.1 * min(teachers, to_zero)


class TransparentFamily(GaussianFamily):
    """Gaussian data whose networks show eight bumps over x."""

    def features(self, network, x_t, time, cond, *, blocks="first_half"):
        return [torch.exp(-((x_t - torch.linspace(-2, 2, 8, dtype=torch.float64)) ** 2))[:, :, None, None]]

    def feature_channels(self, network, *, blocks="first_half"):
        return [8]


def test_the_adversarial_term_leaves_the_fixed_point_where_it_is():
    """Real is the target: where the student is consistent there is nothing to tell apart (theorem 5)."""
    plain = family_of("eps", 6)
    family = TransparentFamily(plain.schedule, "epsilon", plain._times)
    trained = train(family, steps=400, num_ddim_timesteps=6, num_phases=2, adversarial_weight=0.1)
    right, teachers, to_zero = errors(trained, teacher_of(family.schedule))
    print(f"right {right:.1e} teacher {teachers:.1e} target at 0 {to_zero:.1e}")
    assert right <= 0.1 * min(teachers, to_zero)


# -- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "num_phases"), [(40, 4), (40, 3), (7, 4), (6, 4), (5, 5), (50, 16), (8, 1)])
def test_phases_tile_the_grid_and_begin_at_the_samplers_times(num_steps, num_phases):
    lower, upper = phase_of(torch.arange(num_steps), num_steps=num_steps, num_phases=num_phases)
    assert lower.tolist() == [edge_of(i, num_steps, num_phases) for i in range(num_steps)]
    for i in range(num_steps):
        assert lower[i] <= i <= upper[i]
        assert torch.equal(lower[lower[i] : upper[i] + 1].unique(), lower[i : i + 1])
    if num_steps % num_phases == 0:  # the authors' edges
        assert lower.unique().tolist() == [math.floor(m * num_steps / num_phases) for m in range(num_phases)]
    grid, scheduler = TABLE.grid(num_steps), TCDScheduler(original_inference_steps=num_steps)
    scheduler.set_timesteps(num_phases)
    assert scheduler.timesteps.tolist() == grid.times[upper.unique()].flip(0).tolist()
    assert [*scheduler.timesteps.tolist()[1:], 0] == grid.previous[lower.unique()].flip(0).tolist()


@pytest.mark.parametrize(("name", "num_phases"), [("eps", 4), ("eps", 3), ("flow-shift", 3)])
def test_targets_end_at_the_edge_and_noise_stays_in_the_phase(monkeypatch, name, num_phases):
    family = family_of(name, 8, mixed=True)
    method, _, context = make(family, num_ddim_timesteps=8, num_phases=num_phases, adversarial_weight=0.1)
    steps_taken, further = [], []
    real_ddim_step, real_noise = pcm.trajectory_function, pcm.renoise
    monkeypatch.setattr(
        pcm, "trajectory_function", lambda p, s: steps_taken.append((p, s, real_ddim_step(p, s))) or steps_taken[-1][2]
    )
    monkeypatch.setattr(
        pcm, "renoise", lambda schedule, x, s, u, e: further.append((s, u)) or real_noise(schedule, x, s, u, e)
    )
    batch = mixture.mixture_batch(0, 400, mean=MEAN)
    list(method.updates(context.at(0, batch.positions), batch, 0))
    (target, s, x_s), (student, s_student, _) = steps_taken
    assert torch.equal(s, s_student)
    grid = family.schedule.grid(8)
    index = torch.searchsorted(grid.times, student.t)
    assert torch.equal(target.t, grid.previous[index])
    assert s.tolist() == [float(grid.previous[edge_of(i, 8, num_phases)]) for i in index.tolist()]
    at_edge = target.t == s
    assert at_edge.any()
    assert torch.equal(x_s[at_edge], target.x_t[at_edge]), "exactly x' at the edge"
    tops = [max(j for j in range(8) if edge_of(j, 8, num_phases) == edge_of(i, 8, num_phases)) for i in index.tolist()]
    for lower, u in further:
        assert torch.equal(lower, s)
        assert u.dtype == grid.times.dtype
        assert bool(((u >= s) & (u < grid.times[tops])).all())
    assert torch.equal(further[0][1], further[1][1]), "real and fake at the same time"


# -- samplers ---------------------------------------------------------------------------------------------------------


ASKED = [(40, 4, None), (40, 4, 8), (40, 3, 3), (40, 4, 2), (40, 4, 6), (40, 3, 8), (40, 3, 40), (8, 3, 7)]


@pytest.mark.parametrize(("num_steps", "num_phases", "asked"), ASKED)
def test_the_sampler_is_ddim_from_edge_to_edge(num_steps, num_phases, asked):
    method = PCM(PCM.Config(num_ddim_timesteps=num_steps, num_phases=num_phases), MethodSetup("lora"))
    sampler = method.sampler(TABLE, num_inference_steps=asked)
    assert sampler.num_inference_steps == (asked or num_phases)
    scheduler = TCDScheduler.from_config({**SDXL, **sampler.config})
    call = dict(sampler.call)
    explicit = call.pop("timesteps", None)
    scheduler.set_timesteps(None if explicit else sampler.num_inference_steps, timesteps=explicit)
    times, grid = scheduler.timesteps.tolist(), TABLE.grid(num_steps)
    assert len(set(times)) == sampler.num_inference_steps
    assert times[0] == grid.times[-1]
    assert set(times) <= set(grid.times.tolist())
    edges = {int(grid.previous[edge_of(i, num_steps, num_phases)]) for i in range(num_steps)}
    assert edges <= {*times, 0} or sampler.num_inference_steps < num_phases
    theirs = ours = torch.randn(64, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = torch.full_like(ours, MEAN)
    for t, u in zip(times, [*times[1:], 0], strict=True):
        x_0, eps = mixture.parts(TABLE.alpha(torch.tensor(t)), TABLE.sigma(torch.tensor(t)), theirs, c)
        theirs = scheduler.step(eps, torch.tensor(t), theirs, **call).prev_sample
        ours = move(TABLE, ours, x_0, torch.tensor(t), torch.tensor(u))
        torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-4)  # the scheduler's table is float32


def test_the_schedulers_own_times_serve_where_they_can():
    """Then any loader of the exported scheduler needs to be told a number of steps alone."""
    method = PCM(PCM.Config(), MethodSetup("lora"))
    told = {steps: "timesteps" in method.sampler(TABLE, num_inference_steps=steps).call for steps in range(1, 41)}
    assert [steps for steps, explicit in told.items() if steps % 4 == 0 and explicit] == []
    assert told[6]
    assert not told[2]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sampler_on_a_flow_ends_at_the_data(shift):
    schedule = FlowSchedule(shift=shift)
    sampler = PCM(PCM.Config(num_ddim_timesteps=20), MethodSetup("lora", prediction_type="flow")).sampler(schedule)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({"shift": shift, **sampler.config})
    scheduler.set_timesteps(**sampler.call)
    grid = schedule.grid(20)
    assert scheduler.sigmas.tolist() == pytest.approx([float(grid.times[i]) for i in (19, 14, 9, 4)] + [0.0])


def test_guidance_is_as_asked_and_on_by_default_for_unguided_students():
    guided, own = (PCM(PCM.Config(cfg_free=flag), MethodSetup("lora")) for flag in (False, True))
    assert [guided.sampler(TABLE, guidance_scale=g).guidance_scale for g in (None, 0.0, 1.5)] == [0.0, 0.0, 1.5]
    assert [own.sampler(TABLE, guidance_scale=g).guidance_scale for g in (None, 0.0, 4.0)] == [7.5, 0.0, 4.0]


def test_more_steps_than_the_grid_has_are_refused():
    with pytest.raises(UserError, match="60 inference steps are more than pcm's num_ddim_timesteps = 40"):
        PCM(PCM.Config(), MethodSetup("lora")).sampler(TABLE, num_inference_steps=60)


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"w_min": 9}, "w_min = 9.0 is above w_max = 8.0"),
        ({"num_phases": 50}, "num_phases = 50 is above num_ddim_timesteps = 40"),
        ({"num_inference_steps": 44}, "num_inference_steps = 44 is above num_ddim_timesteps = 40"),
        ({"empty_prompt_share": 1.5}, "less than or equal to 1"),
        ({"adversarial_weight": -0.1}, "greater than or equal to 0"),
        ({"discriminator_learning_rate": 0}, "greater than 0"),
        ({"phases": 4}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, said):
    with pytest.raises(ValidationError, match=said):
        PCM.Config(**settings)


def test_a_family_without_features_is_refused_unless_the_term_is_off():
    run = RunSettings.model_construct(model_type="full", use_ema=False, lora_dropout=0.0, model_family="gaussian")
    findings, _ = check_requirements(PCM, PCM.Config(), GaussianFamily, run)
    assert ["features" in finding.problem for finding in findings] == [True]
    assert check_requirements(PCM, PCM.Config(adversarial_weight=0), GaussianFamily, run)[0] == []


def test_notices_say_the_guidance_and_the_edges():
    said = lambda **settings: PCM(PCM.Config(**settings), MethodSetup("lora")).notices()  # noqa: E731
    assert said() == ["pcm: the teacher's guidance scale is drawn from 7 to 8 (the LCM paper's w: 6 to 7)"]
    assert said(cfg_free=True, num_phases=2)[0].startswith(
        "pcm: the teacher's solver runs without guidance and 10% of the samples without their prompt"
    )
    assert "4 or more" in said(cfg_free=True, num_phases=2)[1]
    assert said(num_phases=3)[1].endswith("snapped to the grid's points 0, 14, 27")
