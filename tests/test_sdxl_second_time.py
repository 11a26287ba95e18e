"""A second time for SDXL: starts as the teacher, belongs to one role, has exact derivatives, survives the disk."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from distill.core.diffusion import Prediction
from distill.core.diffusion.flow_map import FlowMapScheduler, SecondTime
from distill.core.diffusion.sampler import Sampler
from distill.core.diffusion.schedule import from_scheduler_config
from distill.core.diffusion.second_time import differentiable_forward
from distill.core.plugin_api.family import ExportInfo, LoraSettings
from support.second_time import PROMPTS, SEEDS, SIZE, add_lora, full_student, inputs, lora_student, make, trained
from support.tiny_sdxl import write_tiny_sdxl
from torch.autograd import forward_ad

FLOW_MAP = Sampler("FlowMapScheduler", {}, 3, 0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def family(tiny):
    return make(tiny)


# -- the embedding ----------------------------------------------------------------------------------------------------


def test_a_second_time_starts_as_the_teacher_bit_for_bit(family):
    x_t, t, r, cond = inputs(family)
    teacher = family.load_network()
    expected = family.predict(teacher, x_t, t, cond)
    full = family.student_network(teacher, guidance_embedding=False, second_time=True)
    assert torch.equal(family.predict(full, x_t, t, cond, second_time=r), expected)
    assert all(parameter.requires_grad for parameter in full.second_time.parameters())
    network = add_lora(family.load_network(), "student", std=0.0)
    family.add_second_time(network)
    assert torch.equal(family.predict(network, x_t, t, cond, second_time=r), expected)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_trained_network_depends_on_the_second_time_and_is_unchanged_without_it(family, kind):
    network = lora_student(family) if kind == "lora" else full_student(family)
    x_t, t, r, cond = inputs(family)
    without = family.predict(network, x_t, t, cond)
    with_r = family.predict(network, x_t, t, cond, second_time=r)
    other = family.predict(network, x_t, t, cond, second_time=r - 50)
    assert (with_r - without).abs().max() > 1e-3
    assert (with_r - other).abs().max() > 1e-4
    # each sample its own
    swapped = family.predict(network, x_t, t, cond, second_time=torch.stack([r[0], r[1] - 50]))
    torch.testing.assert_close(swapped[0], with_r[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(swapped[1], other[1], rtol=0, atol=1e-5)
    assert torch.equal(family.predict(network, x_t, t, cond), without)
    if kind == "full":
        assert torch.equal(without, family.predict(family.load_network(), x_t, t, cond))


def test_roles_on_one_base_have_second_times_of_their_own(family):
    from distill.core.engine.networks import AdapterSwitch

    network = add_lora(lora_student(family), "fake", seed=1)
    add_lora(network, "plain", seed=2)
    fake = trained(family.add_second_time(network, name="fake"), seed=7, std=0.3)
    assert family.add_second_time(network, name="fake") is fake
    names = [name for name, _ in network.named_parameters() if name.startswith("second_time.")]
    layers = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
    assert names == [f"second_time.{role}.{layer}" for role in ("student", "fake") for layer in layers]
    x_t, t, r, cond = inputs(family)
    switch = AdapterSwitch(network)
    alone = lora_student(family)
    with switch.use("student"):
        ours = family.predict(network, x_t, t, cond, second_time=r)
        family.predict(network, x_t, t, cond, second_time=r).sum().backward()
    torch.testing.assert_close(ours, family.predict(alone, x_t, t, cond, second_time=r), rtol=0, atol=1e-5)
    assert network.second_time["student"].hidden.weight.grad.abs().sum() > 0
    assert fake.hidden.weight.grad is None
    with switch.use("fake"):
        assert (family.predict(network, x_t, t, cond, second_time=r) - ours).abs().max() > 1e-3
    for role in ("plain", None):
        with switch.use(role), pytest.raises(ValueError, match="takes no second time"):
            family.predict(network, x_t, t, cond, second_time=r)
    assert torch.equal(family.predict(network, x_t, t, cond), family.predict(family.load_network(), x_t, t, cond))


def test_a_copy_has_a_second_time_of_its_own(family):
    network = full_student(family)
    twin = copy.deepcopy(network)
    x_t, t, r, cond = inputs(family)
    before = family.predict(network, x_t, t, cond, second_time=r)
    assert torch.equal(family.predict(twin, x_t, t, cond, second_time=r), before)
    trained(twin.second_time, seed=9)
    assert torch.equal(family.predict(network, x_t, t, cond, second_time=r), before)
    assert (family.predict(twin, x_t, t, cond, second_time=r) - before).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_gradient(family):
    x_t, t, r, cond = inputs(family)

    def gradients(checkpointing):
        network = full_student(family).train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        # two calls with different second times before one backward
        first = family.predict(network, x_t, t, cond, second_time=r)
        second = family.predict(network, x_t, t, cond, second_time=r - 100)
        (first * second).sum().backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain["second_time.student.output.weight"].abs().sum() > 0
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_the_embedding_is_computed_in_float32_under_autocast(family):
    module = trained(SecondTime(16), std=0.3)
    t, r = torch.tensor([999.0, 500.0]), torch.tensor([998.5, 0.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = module(t, r)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, module(t, r))
    network = lora_student(family)
    x_t, t, r, cond = inputs(family)
    exact = family.predict(network, x_t, t, cond, second_time=r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = family.predict(network, x_t, t, cond, second_time=r)
    assert (near - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_half_precision_base_keeps_a_float32_embedding(tiny):
    family = make(tiny, weight_dtype="bfloat16")
    network = lora_student(family)
    assert {parameter.dtype for parameter in network.second_time.parameters()} == {torch.float32}
    x_t, t, r, cond = inputs(family)
    assert family.predict(network, x_t, t, cond, second_time=r).dtype == torch.bfloat16
    assert network.dtype == torch.bfloat16


# -- exact derivatives ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smooth(family):
    """(function of (x_t, t, r), primals, tangents) in float64 throughout, LoRA and second time on."""
    network = lora_student(family).double()
    project = network.time_proj
    # diffusers embeds the time in float32, which differences of small steps see
    half = project.num_channels // 2
    frequency = torch.exp(-torch.arange(half, dtype=torch.float64) / half * torch.tensor(10000.0).double().log())
    project.forward = lambda t: torch.cat([(t[:, None] * frequency).cos(), (t[:, None] * frequency).sin()], dim=1)
    x_t, t, r, cond = inputs(family, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    v = torch.randn(x_t.shape, generator=generator, dtype=torch.float64)

    def function(x, t, r):
        return family.predict(network, x, t, cond, second_time=r)

    return function, (x_t, t, r), (v, torch.tensor([1.0, 0.7]).double(), torch.tensor([0.3, -0.2]).double())


@pytest.mark.parametrize("varied", ["all", "x", "t", "r"])
def test_exact_derivatives_equal_central_differences(family, smooth, varied):
    function, primals, tangents = smooth
    which = ("x", "t", "r")
    tangents = tuple(
        v if varied in ("all", name) else torch.zeros_like(v) for name, v in zip(which, tangents, strict=True)
    )
    h = 1e-5
    with torch.no_grad():
        ahead = function(*(p + h * v for p, v in zip(primals, tangents, strict=True)))
        behind = function(*(p - h * v for p, v in zip(primals, tangents, strict=True)))
        differences = (ahead - behind) / (2 * h)
        with family.forward_ad():
            value, exact = torch.func.jvp(function, primals, tangents)
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(p, v) for p, v in zip(primals, tangents, strict=True)]
                dual = forward_ad.unpack_dual(function(*duals))
        with differentiable_forward():
            torch.testing.assert_close(value, function(*primals), rtol=0, atol=1e-12)
    assert differences.abs().max() > 1e-7
    torch.testing.assert_close(exact, differences, rtol=1e-5, atol=1e-8 * float(differences.abs().max()) + 1e-10)
    torch.testing.assert_close(dual.tangent, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(dual.primal, value, rtol=0, atol=1e-12)


def test_the_time_of_diffusers_own_projection_is_differentiable(family):
    """In float32, as it runs: no integer cast on the way."""
    network = lora_student(family)
    x_t, t, r, cond = inputs(family)
    zeros, ones = torch.zeros_like(x_t), torch.ones_like(t)
    with torch.no_grad(), family.forward_ad():
        exact = torch.func.jvp(
            lambda x, t, r: family.predict(network, x, t, cond, second_time=r), (x_t, t, r), (zeros, ones, ones)
        )[1]
        ahead, behind = (family.predict(network, x_t, t + h, cond, second_time=r + h) for h in (0.125, -0.125))
    assert exact.abs().max() > 1e-5
    assert (exact - (ahead - behind) / 0.25).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_exact_derivatives_under_autocast_are_near(family, kind):
    """As a run in mixed precision asks for them."""
    network = lora_student(family) if kind == "lora" else full_student(family).train()
    x_t, t, r, cond = inputs(family)
    tangents = (torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1)), torch.ones_like(t) / 100, t * 0)

    def derivative():
        with torch.no_grad(), family.forward_ad(), forward_ad.dual_level():
            x, t_, r_ = (forward_ad.make_dual(p, v) for p, v in zip((x_t, t, r), tangents, strict=True))
            return forward_ad.unpack_dual(family.predict(network, x, t_, cond, second_time=r_)).tangent

    exact = derivative()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = derivative().float()
    assert (near - exact).norm() < 0.05 * exact.norm()


# -- the scheduler ----------------------------------------------------------------------------------------------------

VP = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "scaled_linear": {**VP, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"},
    "linear": {**VP, "beta_schedule": "linear", "prediction_type": "sample"},
    "cosine": {**VP, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "zero_snr": {
        **VP,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}


def scheduler_of(name):
    config = {key: value for key, value in SCHEDULES[name].items() if key != "_class_name"}
    return FlowMapScheduler(**{"prediction_type": "flow", **config})


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_flow_map_schedulers_coefficients_are_those_of_the_schedule(name):
    schedule, _ = from_scheduler_config(SCHEDULES[name])
    scheduler = scheduler_of(name)
    t = torch.tensor([0.0, 0.5, 100.0, 512.25, 998.0, 998.5, 999.0], dtype=torch.float64)
    own = t / 1000 if name == "flow" else t
    ours = torch.tensor([scheduler._coefficients(float(time)) for time in t], dtype=torch.float64)
    torch.testing.assert_close(ours[:, 0], schedule.alpha(own), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(ours[:, 1], schedule.sigma(own), rtol=1e-6, atol=1e-12)
    assert scheduler._coefficients(999.0)[0] == 0 or name != "zero_snr"
    x, noise = torch.randn(7, 4, 3, 3).double(), torch.randn(7, 4, 3, 3).double()
    torch.testing.assert_close(scheduler.add_noise(x, noise, t), schedule.add_noise(x, noise, own))


@pytest.mark.parametrize("steps", [1, 3, 4, 50])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_flow_map_steps_are_ddim_steps_and_end_at_the_data(name, steps):
    schedule, kind = from_scheduler_config(SCHEDULES[name])
    scheduler = scheduler_of(name)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.double()
    assert len(times) == steps
    assert times[0] == (1000 if name == "flow" else 999)
    own = times / 1000 if name == "flow" else times
    if name == "flow":
        torch.testing.assert_close(own, schedule.grid(steps).times.flip(0), rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(0)
    x = y = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    for i, time in enumerate(times):
        x = scheduler.scale_model_input(x, time)
        output = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        r = float(times[i + 1]) if i + 1 < steps else 0.0
        assert scheduler.pair == pytest.approx((float(time), r))
        prediction = Prediction(output, y, own[i].expand(2), schedule, kind)
        y = prediction.ddim_step(own[i + 1].expand(2)) if i + 1 < steps else prediction.x0
        x = scheduler.step(output, time, x, return_dict=False)[0]
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_flow_map_times_are_those_of_ddim_trailing():
    from diffusers import DDIMScheduler

    for steps in (1, 2, 3, 4, 7, 8, 30):
        ddim = DDIMScheduler(timestep_spacing="trailing")
        ddim.set_timesteps(steps)
        ours = scheduler_of("linear")
        ours.set_timesteps(steps)
        assert ours.timesteps.tolist() == ddim.timesteps.tolist()


def test_flow_map_times_may_be_given_or_begin_late():
    scheduler = scheduler_of("cosine")
    scheduler.set_timesteps(timesteps=[999, 400.5, 30])
    assert scheduler.pair == (999.0, 400.5)
    scheduler.set_begin_index(1)
    scheduler._step = None
    assert scheduler.pair == (400.5, 30.0)
    scheduler.set_timesteps(timesteps=[999, 400.5, 30])
    scheduler.scale_model_input(torch.zeros(1), torch.tensor(30.0))
    assert scheduler.pair == (30.0, 0.0)
    with pytest.raises(ValueError, match="must fall"):
        scheduler.set_timesteps(timesteps=[30, 400])
    with pytest.raises(ValueError, match="1 to 1000"):
        scheduler.set_timesteps(0)
    flow = scheduler_of("flow")
    flow.set_timesteps(sigmas=[1.0, 0.25])
    assert flow.timesteps.tolist() == [1000.0, 250.0]
    with pytest.raises(ValueError, match="alpha is 0"):
        FlowMapScheduler(rescale_betas_zero_snr=True).set_timesteps(4)


# -- images ---------------------------------------------------------------------------------------------------------


def by_hand(family, network, guidance, *, steps, size=32):
    """The student's latents by a loop of predictions and jumps, decoded; guided as the pipeline guides: raw outputs."""
    schedule, kind = family.schedule, family.prediction_type
    noise = [torch.randn(1, 4, size // 2, size // 2, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    x, embeds = torch.cat(noise), family.encode_prompts(PROMPTS)
    ids = torch.tensor([[size, size, 0, 0, size, size]] * len(SEEDS), dtype=torch.float32)
    cond = {**embeds, "time_ids": ids}
    scheduler = family.scheduler(FLOW_MAP)
    scheduler.set_timesteps(steps)
    times = [*scheduler.timesteps.tolist(), 0.0]
    own = 1000 if kind == "flow" else 1
    for t, r in pairwise(times):
        t_, r_ = torch.full((len(x),), t), torch.full((len(x),), r)
        output = family.predict(network, x, t_, cond, second_time=r_)
        if guidance > 1:
            without = family.predict(network, x, t_, family.uncond(cond), second_time=r_)
            output = without + guidance * (output - without)
        prediction = Prediction(output, x, t_ / own, schedule, kind)
        x = prediction.ddim_step(r_ / own) if r else prediction.x0
    return family.decode_latents(x)


@pytest.mark.parametrize(
    ("kind", "zero_snr", "guidance"),
    [("epsilon", False, 0.0), ("epsilon", False, 4.0), ("v_prediction", True, 0.0), ("flow", False, 0.0)],
)
def test_images_are_a_loop_of_ddim_steps_with_the_next_time_fed(tmp_path, kind, zero_snr, guidance):
    family = make(write_tiny_sdxl(tmp_path / "model", prediction_type=kind, zero_snr=zero_snr))
    network = lora_student(family)
    embeds = family.encode_prompts(PROMPTS)
    for steps in (1, 3):
        ours = family.generate(
            network, embeds, sampler=FLOW_MAP, seeds=SEEDS, num_inference_steps=steps, guidance_scale=guidance, **SIZE
        )
        with torch.no_grad():
            expected = by_hand(family, network, guidance, steps=steps)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    one_time = add_lora(family.load_network(), "student")
    without = family.generate(one_time, embeds, sampler=FLOW_MAP, seeds=SEEDS, guidance_scale=guidance, **SIZE)
    assert (without - ours).abs().max() > 1e-3, "the second time does something"


def test_another_scheduler_cannot_feed_the_second_time(family):
    network = lora_student(family)
    euler = Sampler("EulerDiscreteScheduler", {}, 2, 0.0)
    with pytest.raises(ValueError, match="use FlowMapScheduler"):
        family.generate(network, family.encode_prompts(PROMPTS), sampler=euler, seeds=SEEDS, **SIZE)


# -- on disk ----------------------------------------------------------------------------------------------------------

ALONE = """
import sys
from runpy import run_path
import torch
from diffusers import StableDiffusionXLPipeline

base, lora, full, out = sys.argv[1:]
made = {}
for name, folder in (("lora", lora), ("full", full)):
    if name == "lora":
        pipe = StableDiffusionXLPipeline.from_pretrained(base)
        pipe.load_lora_weights(folder)
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, scheduler=None)
    run_path(f"{folder}/flow_map.py")["attach"](pipe, folder)
    pipe.set_progress_bar_config(disable=True)
    for steps, guidance in ((3, 0.0), (2, 4.0)):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
        images = pipe(
            ["a red fox", "two boats"], generator=generators, output_type="pt", width=32, height=32,
            num_inference_steps=steps, guidance_scale=guidance,
        ).images
        made[f"{name}-{steps}"] = images
assert not any(module.split(".")[0] == "distill" for module in sys.modules), "plain diffusers alone"
torch.save(made, out)
"""


@pytest.fixture(scope="module")
def students(family, tmp_path_factory):
    """Both kinds of student with the engine's images: {kind: (folder, {steps: images})}."""
    folder, embeds, found = tmp_path_factory.mktemp("students"), family.encode_prompts(PROMPTS), {}
    for kind, network in (("lora", lora_student(family)), ("full", full_student(family))):
        images = {
            steps: family.generate(
                network, embeds, sampler=FLOW_MAP, seeds=SEEDS, num_inference_steps=steps, guidance_scale=guidance,
                **SIZE,
            )
            for steps, guidance in ((3, 0.0), (2, 4.0))
        }  # fmt: skip
        before = set(network.state_dict())
        family.export(network, folder / kind, ExportInfo(FLOW_MAP, kind, LoraSettings(4, 8.0)))
        assert set(network.state_dict()) == before
        found[kind] = folder / kind, images
    return found


def test_students_make_the_same_images_in_plain_diffusers_alone(tiny, students, tmp_path):
    out = tmp_path / "images.pt"
    arguments = [str(tiny), str(students["lora"][0]), str(students["full"][0]), str(out)]
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not used" not in done.stderr, "unet/ holds the network's own weights only"
    alone = torch.load(out)
    for kind, (_, images) in students.items():
        for steps, expected in images.items():
            assert (alone[f"{kind}-{steps}"] - expected).abs().max() < 1e-5, (kind, steps)


def test_a_full_student_is_not_run_by_accident_without_its_second_time(students):
    from diffusers import StableDiffusionXLPipeline

    with pytest.raises(ValueError, match="scheduler"):
        StableDiffusionXLPipeline.from_pretrained(students["full"][0])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_load_student_restores_the_second_time(tiny, students, kind):
    folder, images = students[kind]
    family = make(tiny)
    network = family.load_student(folder)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    embeds = family.encode_prompts(PROMPTS)
    for steps, expected in images.items():
        ours = family.generate(
            network, embeds, sampler=FLOW_MAP, seeds=SEEDS, num_inference_steps=steps,
            guidance_scale=4.0 if steps == 2 else 0.0, **SIZE,
        )  # fmt: skip
        assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_usage_snippet_runs(family, students, monkeypatch, tmp_path, kind):
    folder, _ = students[kind]
    (tmp_path / "student").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    snippet = family.usage_snippet(ExportInfo(FLOW_MAP, kind))
    assert "sys.path" not in snippet
    names = {}
    exec(compile(snippet, "snippet", "exec"), names)
    assert (tmp_path / "fox.png").is_file()
    assert type(names["pipe"].scheduler).__name__ == "FlowMapScheduler"


def test_a_second_time_needs_the_flow_map_sampler(family, tmp_path):
    ddim = Sampler("DDIMScheduler", {}, 2, 0.0)
    with pytest.raises(ValueError, match="is run with FlowMapScheduler"):
        family.export(lora_student(family), tmp_path, ExportInfo(ddim, "lora"))


def test_a_student_without_a_second_time_may_use_the_sampler(tiny, family, tmp_path):
    from runpy import run_path

    from diffusers import StableDiffusionXLPipeline

    network = add_lora(family.load_network(), "student")
    expected = family.generate(network, family.encode_prompts(PROMPTS), sampler=FLOW_MAP, seeds=SEEDS, **SIZE)
    family.export(network, tmp_path, ExportInfo(FLOW_MAP, "lora"))
    assert not (tmp_path / "second_time.safetensors").exists()
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path)
    run_path(str(tmp_path / "flow_map.py"))["attach"](pipe, tmp_path)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipe(
        PROMPTS, generator=generators, output_type="pt", num_inference_steps=3, guidance_scale=0.0, **SIZE
    ).images
    assert (images - expected).abs().max() < 1e-5
