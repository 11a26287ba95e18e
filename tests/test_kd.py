"""Knowledge distillation reaches the exact flow map of known data, at the times it is trained at."""

import json
from dataclasses import replace

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.data.cache.teacher_trajectory import follow
from distill.core.diffusion import FlowSchedule, Prediction
from distill.core.diffusion.solvers import trailing_timesteps
from distill.core.errors import UserError
from distill.core.plugin_api.batch import Batch, Trajectories
from distill.core.plugin_api.method import MethodSetup, Requirements
from distill.core.registry.registry import Registry
from distill.core.runs.run import run
from distill.core.testing.gaussian import GaussianFamily, Q, raw_output
from distill.core.testing.paths import PATHS, TABLE, train
from distill.distill_methods.kd import KD
from pydantic import ValidationError
from support.networks import Vgg, network_file
from support.tiny_sdxl import write_tiny_sdxl
from support.trial import make_trial

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


# -- in pixels ------------------------------------------------------------------------------------------------------


LPIPS = {"loss_type": "lpips", "lpips_network": str(network_file(Vgg))}


def test_the_perceptual_loss_is_lpips_of_the_decoded_images_and_may_have_one_of_latents_beside(tmp_path):
    folder = write_tiny_sdxl(tmp_path / "model")
    found = {}
    for weight in (0.0, 0.3):
        trial = make_trial(folder, KD, KD.Config(num_inference_steps=1, latent_weight=weight, **LPIPS), "lora")
        batch, decode = trial.batch(0), trial.family.decode_pixels
        (update,) = trial.method.updates(trial.context.at(0, batch.positions), batch, 0)
        paths = batch.trajectories
        told = torch.full((len(batch),), 399)
        ours = trial.context.predict("student", paths.noise, told, paths.cond).x0
        network = Vgg()
        network.load_state_dict(torch.jit.load(network_file(Vgg)).state_dict())
        seen = [network(255 * decode(x), False, True) for x in (ours, paths.data)]
        lpips = (seen[0] - seen[1]).square().sum(1)
        latent = (ours - paths.data).square().flatten(1).mean(1)
        expected = lpips + weight * latent
        torch.testing.assert_close(update.per_sample, expected.detach().to(update.per_sample), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(update.metrics["lpips"], lpips.detach().mean(), rtol=1e-4, atol=1e-7)
        assert ("latent" in update.metrics) == bool(weight)
        parameters = trial.networks.parameters("student")
        pairs = zip(
            torch.autograd.grad(update.loss, parameters, allow_unused=True),
            torch.autograd.grad(expected.mean(), parameters, allow_unused=True),
            strict=True,
        )
        for one, other in pairs:
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-9)
        found[weight] = update.loss.item()
    assert found[0.3] > found[0.0]


def test_a_few_steps_of_it_lower_lpips_on_the_miniature(tmp_path):
    """One noise per prompt, all of them at every step, so that nothing but the student changes."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    prompts = {"id": "prompts", "dataset_type": "prompts", "prompts_file": "prompts.txt", "resolution": 32,
               "resolution_type": "pixel", "train_batch_size": 2}  # fmt: skip
    pairs = {"id": "pairs", "dataset_type": "distillation_cache", "num_inference_steps": 8, "guidance_scale": 3.0}
    (tmp_path / "data.json").write_text(json.dumps([prompts, pairs]))
    flags = {"distillation_method": "kd", "model_family": "sdxl", "output_dir": str(tmp_path / "out")}
    own = {"num_inference_steps": 1, "loss_type": "lpips", "lpips_network": network_file(Vgg)}
    overrides = [
        "max_train_steps=12", "learning_rate=1e-3", "lr_scheduler=constant", "lora_rank=8", "use_ema=false",
        "validation_step_interval=0", "evaluation_num_samples=0", "checkpoint_step_interval=0", "report_to=none",
        "validation_num_inference_steps=1", "lr_warmup_steps=0",
        *(f"distillation_config.kd.{key}={value}" for key, value in own.items()),
    ]  # fmt: skip
    registry = Registry.load(installed=False)
    run(load_configuration(registry, data_file=tmp_path / "data.json", flags=flags, overrides=overrides), registry)
    rows = [json.loads(line)["lpips"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    print(rows)
    assert rows[-1] < 0.7 * rows[0]


def test_settings_of_lpips_without_it_are_refused_and_a_missing_network_says_where_it_is():
    for key, value in (("lpips_network", "vgg16.pt"), ("latent_weight", 1.0)):
        with pytest.raises(ValidationError, match=f"{key} has no effect with loss_type = l2: set loss_type to lpips"):
            KD.Config(**{key: value})
    path = "distillation_config.kd"
    with pytest.raises(UserError, match=r"kd.lpips_network is missing\n  name the file: download https.*/vgg16.pt"):
        KD.check_sources(KD.Config(loss_type="lpips"), path=path)
    with pytest.raises(UserError, match=r"kd.lpips_network = 'no.pt': there is no such file"):
        KD.check_sources(KD.Config(loss_type="lpips", lpips_network="no.pt"), path=path)
    KD.check_sources(KD.Config(**LPIPS), path=path)
    KD.check_sources(KD.Config(), path=path)
    assert KD.requires(KD.Config(**LPIPS), MethodSetup("lora")).pixels
    assert not KD.requires(KD.Config(), MethodSetup("lora")).pixels


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
