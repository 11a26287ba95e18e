"""Guidance distillation: one call of the student is the guided teacher, at each guidance that it is told."""

import json

import pytest
import torch
from distill.core.diffusion import FlowSchedule, Prediction
from distill.core.plugin_api.method import MethodSetup
from distill.core.testing.gaussian import affine_of, gaussian_batch
from distill.core.testing.paths import PATHS, TABLE, train
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.guidance import Guidance
from pydantic import ValidationError
from support.closed_form import GuidedFamily
from support.mixture import MixtureFamily, guided_parts, mixture_batch
from support.resuming import resumed_equals_whole
from support.sdxl_methods import call, loss_and_gradients, make_parts, table
from support.sdxl_setup import make_batch, split
from support.tiny_sdxl import write_tiny_sdxl

MEAN = 0.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers_per_block=1)


# -- closed form ------------------------------------------------------------------------------------------------------


def coarse(schedule, count=8):
    """The same path with few timesteps, so that a table over all of them is soon learned."""
    if schedule.clean_at_zero:
        return FlowSchedule(shift=schedule.shift, num_train_timesteps=count)
    betas = 1 - schedule.alpha(torch.linspace(0, 999, count).long()) ** 2
    from distill.core.diffusion import DDPMSchedule

    return DDPMSchedule(1 - betas)


def rms(x):
    return x.square().mean().sqrt().item()


def noised(schedule, count=256):
    """(x_t, t) over all training times, of data of the prompt."""
    times = schedule.grid(schedule.num_train_timesteps).times
    rng = RngStreams(3, 0, tuple(range(count)))
    x_0 = gaussian_batch(99, count, mean=MEAN).latents
    t = times[torch.arange(count) % len(times)]
    return schedule.add_noise(x_0, rng.randn("noise", (1,)).double(), t), t


def student_x0(context, x, t, w):
    told = None if w is None else torch.full((len(x),), w, dtype=torch.float64)
    with torch.no_grad():
        return context.predict("student", x, t, {"mean": torch.full_like(x, MEAN)}, guidance=told).x0


def guided_gaussian(schedule, x, t, scale):
    a, b = affine_of("sample", schedule, t)
    return a[:, None] * x + b[:, None] * scale * MEAN


@pytest.mark.parametrize("path", PATHS)
def test_a_student_that_takes_w_is_the_guided_teacher_at_every_w(path):
    """The wrong target, the teacher without guidance, would leave it where it began."""
    kind, schedule = PATHS[path]
    schedule = coarse(schedule)
    family = GuidedFamily(schedule, kind, schedule.grid(8).times)
    config = Guidance.Config(w_min=1.0, w_max=5.0)
    _, _, context = train(
        Guidance, config, family, lambda step: gaussian_batch(step, 32, mean=MEAN), num_steps=500, lr=5e-2
    )
    x, t = noised(schedule)
    for scale in (1.0, 2.5, 5.0):
        exact = guided_gaussian(schedule, x, t, scale)
        error = rms(student_x0(context, x, t, scale - 1) - exact)
        wrong = rms(guided_gaussian(schedule, x, t, 1.0) - guided_gaussian(schedule, x, t, 2.5))
        print(f"{path} scale={scale}: right {error:.2e} wrong {wrong:.2e}")
        assert error <= 0.02 * wrong


@pytest.mark.parametrize("path", ["eps", "flow-shift"])
def test_on_a_mixture_a_student_of_one_scale_is_the_guided_teacher(path):
    kind, schedule = PATHS[path]
    schedule = coarse(schedule, 4)
    family = MixtureFamily(schedule, kind, schedule.grid(4).times, prompts=(MEAN,))
    config = Guidance.Config(w_min=3.0, w_max=3.0)
    _, _, context = train(
        Guidance, config, family, lambda step: mixture_batch(step, 256, mean=MEAN), num_steps=150, lr=0.1
    )
    batch = mixture_batch(1000, 256, mean=MEAN)
    t = schedule.grid(4).times[torch.arange(256) % 4]
    x = schedule.add_noise(batch.latents, RngStreams(3, 0, batch.positions).randn("noise", (1,)).double(), t)
    exact, _ = guided_parts(*schedule.coefficients(t, x), x, batch.cond["mean"], 3.0)
    plain, _ = guided_parts(*schedule.coefficients(t, x), x, batch.cond["mean"], 1.0)
    error, wrong = rms(student_x0(context, x, t, None) - exact), rms(plain - exact)
    print(f"{path}: right {error:.2e} wrong {wrong:.2e}")
    assert error <= 0.1 * wrong


@pytest.mark.parametrize("schedule", [TABLE, FlowSchedule(shift=3.0)], ids=["table", "flow"])
def test_the_mean_over_a_range_of_guidance_is_its_middle(schedule):
    """Guidance is linear in w, so the best student without an input is the teacher at the middle: a LoRA's target."""
    x, t = noised(schedule)
    g = torch.Generator().manual_seed(0)
    out = torch.randn(2, *x.shape, generator=g, dtype=torch.float64)
    from distill.core.diffusion import classifier_free_guidance

    pair = [Prediction(part, x, t, schedule, "v_prediction") for part in out]
    scales = torch.linspace(2, 10, 101, dtype=torch.float64)
    mean = torch.stack([classifier_free_guidance(*pair, s.expand(len(x))).x0 for s in scales]).mean(0)
    torch.testing.assert_close(
        mean, classifier_free_guidance(*pair, torch.full((len(x),), 6.0)).x0, rtol=1e-9, atol=1e-9
    )


# -- one step on SDXL -------------------------------------------------------------------------------------------------


def papers_loss(parts, batch, *, step, told):
    """Algorithm 1 of arXiv 2210.03142, in eps of SDXL's table, with nothing of the method's or the diffusion core's."""
    config, n = parts.method.config, len(batch)
    rng = RngStreams(0, step, batch.positions)
    t = rng.integers("index", 1000)
    omega = rng.uniform("w", config.w_min, config.w_max)
    if not told:
        omega = torch.full_like(omega, (config.w_min + config.w_max) / 2)
    bar = table()[t].reshape(n, 1, 1, 1)
    a, s, w = bar.sqrt(), (1 - bar).sqrt(), omega - 1
    x_t = a * batch.latents + s * rng.randn("noise", batch.latents.shape[1:]).double()
    with torch.no_grad():
        with_prompt, without = (
            (x_t - s * call(parts.networks, "teacher", x_t, t, batch.cond, prompt=p)) / a for p in (True, False)
        )
        target = (1 + w.reshape(n, 1, 1, 1)) * with_prompt - w.reshape(n, 1, 1, 1) * without
    output = (x_t - s * call(parts.networks, "student", x_t, t, batch.cond, w=w if told else None)) / a
    snr = bar / (1 - bar)
    weights = {"truncated_snr": snr.clamp(min=1), "snr_plus_one": 1 / (1 - bar), "trained_space": snr}
    weight = weights[config.loss_weight]
    return (weight * (output - target) ** 2).mean()


@pytest.mark.parametrize("loss_weight", ["truncated_snr", "snr_plus_one", "trained_space"])
@pytest.mark.parametrize(("model_type", "top"), [("lora", 3.0), ("lora", 7.0), ("full", 3.0), ("full", 7.0)])
def test_one_step_equals_the_papers_algorithm(folder, model_type, top, loss_weight):
    parts = make_parts(Guidance, folder, model_type=model_type, w_min=3.0, w_max=top, loss_weight=loss_weight)
    batch = make_batch(parts.family)
    (update,) = parts.method.updates(parts.context.at(5, batch.positions), batch, 5)
    loss, gradients = loss_and_gradients(parts, update.loss)
    expected = papers_loss(parts, batch, step=5, told=model_type == "full" and top > 3.0)
    exact, wanted = loss_and_gradients(parts, expected)
    assert loss == pytest.approx(exact, rel=1e-9)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_teacher_stays_bitwise_and_accumulating_changes_nothing(folder, model_type):
    weights = []
    for count in (1, 4):
        parts = make_parts(Guidance, folder, model_type=model_type)
        own = {id(p) for p in parts.networks.parameters("student")}
        keep = {n: p.clone() for n, p in parts.networks.base.state_dict(keep_vars=True).items() if id(p) not in own}
        start = [p.clone() for p in parts.networks.parameters("student")]
        for step in range(3):
            parts.loop.step(step, split(make_batch(parts.family, seed=step), count))
        now = parts.networks.base.state_dict(keep_vars=True)
        assert all(torch.equal(now[name], value) for name, value in keep.items())
        trained = [p.clone() for p in parts.networks.parameters("student")]
        assert all(not torch.equal(p, q) for p, q in zip(trained, start, strict=True))
        weights.append(trained)
    for one, four in zip(*weights, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "variant", [{}, {"model_type": "full", "learning_rate": 1e-4, "validation_step_interval": 2}], ids=["lora", "full"]
)
def test_a_run_resumes_bit_for_bit_and_exports_its_guidance_input_and_sampler(tmp_path, variant):
    settings = {
        "distillation_method": "guidance", "distillation_config": {"guidance": {"num_inference_steps": 2}},
        "max_train_steps": 3, "validation_step_interval": 0, "checkpoint_step_interval": 1,
    }  # fmt: skip
    student = resumed_equals_whole(tmp_path, (2,), **{**settings, **variant}) / "student"
    if variant:
        unet = json.loads((student / "unet" / "config.json").read_text())
        assert unet["time_cond_proj_dim"] == 256, "the student takes the guidance"
    scheduler = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["timestep_spacing"]) == ("DDIMScheduler", "leading")


def test_a_student_costs_half_of_its_teacher(folder):
    """Passes of a sample through the network: two for the teacher with guidance, one for the student."""
    parts = make_parts(Guidance, folder)
    seen = []
    parts.networks.base.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    embeds = parts.family.encode_prompts(["a red thing"])
    parts.networks.base.to(torch.float32)
    sampler = parts.method.sampler(parts.family.schedule, num_inference_steps=2)
    for role, guidance in (("teacher", 6.0), ("student", sampler.guidance_scale)):
        with parts.networks.use(role) as network:
            parts.family.generate(
                network, embeds, sampler=sampler, seeds=[0], width=32, height=32, guidance_scale=guidance
            )
    assert seen == [2, 2, 1, 1]


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_network_takes_w_where_there_is_more_than_one():
    def embeds(model_type, **config):
        setup = MethodSetup(model_type)
        *_, student = Guidance.roles(Guidance.Config(**config), setup)
        assert student.guidance_embedding == Guidance.requires(Guidance.Config(**config), setup).guidance_embedding
        return student.guidance_embedding

    assert embeds("full")
    assert not embeds("full", w_min=5.0, w_max=5.0)
    assert not embeds("lora")


@pytest.mark.parametrize(("schedule", "name"), [(TABLE, "DDIM"), (FlowSchedule(3.0), "FlowMatchEulerDiscrete")])
def test_the_sampler_has_the_teachers_steps_and_a_guidance_of_the_range(schedule, name):
    told = Guidance(Guidance.Config(), MethodSetup("full"))
    built_in = Guidance(Guidance.Config(), MethodSetup("lora"))
    assert [told.sampler(schedule, guidance_scale=g).guidance_scale for g in (None, 0, 1, 3, 20)] == [6, 6, 6, 3, 6]
    assert built_in.sampler(schedule).guidance_scale == 0
    sampler = told.sampler(schedule)
    assert (sampler.scheduler, sampler.num_inference_steps) == (f"{name}Scheduler", 25)
    assert "timestep_spacing" not in sampler.config, "the model's own"
    paper = Guidance(Guidance.Config(w_min=1.0, w_max=3.0, guidance_convention="paper"), MethodSetup("full"))
    assert paper.sampler(schedule).guidance_scale == 3


def test_with_the_models_own_spacing_ddim_is_the_models_own_euler():
    """The student's sampler makes the teacher's image: SDXL's Euler scheduler, in DDIM's clothes."""
    from distill.core.testing.paths import NOISE as SDXL
    from distill.model_families.calls.schedulers import build_scheduler

    model = {
        "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading",
        "steps_offset": 1, "interpolation_type": "linear", **SDXL,
    }  # fmt: skip
    noise = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for sampler in (Guidance(Guidance.Config(), MethodSetup("lora")).sampler(TABLE), None):
        scheduler = build_scheduler(model, sampler)
        scheduler.set_timesteps(25)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            eps = torch.tanh(scheduler.scale_model_input(x, t) + t / 1000)
            x = scheduler.step(eps, t, x, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"w_min": 12.0}, "w_min = 12.0 is above w_max = 10.0"),
        ({"w_max": -1.0}, "greater than or equal to 0"),
        ({"guidance_convention": "g"}, "'scale' or 'paper'"),
        ({"num_inference_steps": 0}, "greater than or equal to 1"),
        ({"loss_weight": "snr"}, "truncated_snr"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        Guidance.Config(**settings)


def test_without_guidance_the_teacher_is_called_once_with_the_prompt_alone(tmp_path):
    """w_min = w_max = 1: half of the teacher's work, and the same target up to rounding."""
    from support.sdxl_setup import make_batch, make_setup
    from support.tiny_sdxl import write_tiny_sdxl

    model, rows = write_tiny_sdxl(tmp_path / "model"), []
    family, method, networks, context = make_setup(model, w_min=1.0, w_max=1.0)
    batch = make_batch(family)
    networks.base.register_forward_pre_hook(
        lambda module, args, given: rows.append(len(args[0] if args else given["sample"])), with_kwargs=True
    )
    (update,) = method.updates(context.at(0, batch.positions), batch, 0)
    assert rows == [4, 4, 4]  # teacher, target, student
    family, method, networks, context = make_setup(model, w_min=1.0, w_max=1.0 + 1e-12)
    (both,) = method.updates(context.at(0, batch.positions), batch, 0)
    torch.testing.assert_close(update.loss, both.loss, rtol=1e-9, atol=0)
