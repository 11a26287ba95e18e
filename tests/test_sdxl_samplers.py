"""The samplers that methods name, on SDXL: what their images are, and where they start and end."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from distill.core.diffusion import Prediction
from distill.core.diffusion.sampler import Sampler
from distill.core.plugin_api.family import ExportInfo
from support.second_time import PROMPTS, SEEDS, SIZE, make
from support.tiny_sdxl import EDGE, SCALE_FACTOR, write_tiny_sdxl

DDIM = Sampler("DDIMScheduler", {"timestep_spacing": "trailing"}, 4, 0.0)
TCD = Sampler("TCDScheduler", {"original_inference_steps": 50}, 4, 0.0, {"eta": 0.0})
TCD_NOISY = Sampler("TCDScheduler", {"original_inference_steps": 50}, 4, 0.0, {"eta": 0.3})
EULER = Sampler("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 4, 0.0)
LCM = Sampler("LCMScheduler", {"original_inference_steps": 50}, 4, 0.0, {"timesteps": [999, 759, 499, 259]})
SAMPLERS = {"ddim": DDIM, "tcd": TCD, "tcd-noisy": TCD_NOISY, "euler": EULER, "lcm": LCM}
MODELS = {"epsilon": ("epsilon", False), "v": ("v_prediction", False), "zero_snr": ("v_prediction", True)}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """By name; with a scheduler config as Stability's own, whose other keys belong to its scheduler alone."""
    found = {}
    for name, (kind, zero_snr) in MODELS.items():
        folder = write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / name, prediction_type=kind, zero_snr=zero_snr)
        path = folder / "scheduler" / "scheduler_config.json"
        theirs = {"clip_sample": True, "set_alpha_to_one": False, "skip_prk_steps": True, "sample_max_value": 1.0}
        path.write_text(json.dumps({**json.loads(path.read_text()), **theirs}))
        found[name] = make(folder)
    return found


def make_images(family, sampler, network=None):
    network = family.load_network() if network is None else network
    return family.generate(network, family.encode_prompts(PROMPTS), sampler=sampler, seeds=SEEDS, **SIZE)


def walk(family, edges, *, scale=1.0):
    """Jumps along (t, u) pairs, u = None for the data, from the pipeline's own noise times `scale`; decoded."""
    network, edge = family.load_network(), EDGE // SCALE_FACTOR
    x = scale * torch.cat([torch.randn(1, 4, edge, edge, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    ids = torch.tensor([[EDGE, EDGE, 0, 0, EDGE, EDGE]] * len(SEEDS), dtype=torch.float32)
    cond = {**family.encode_prompts(PROMPTS), "time_ids": ids}
    with torch.no_grad():
        for t, u in edges:
            time = torch.full((len(x),), t)
            output = family.predict(network, x, time, cond)
            prediction = Prediction(output, x, time, family.schedule, family.prediction_type)
            x = prediction.x0 if u is None else prediction.ddim_step(torch.full((len(x),), u))
        return family.decode_latents(x)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("model", list(MODELS))
def test_ddim_trailing_starts_at_the_last_timestep_and_ends_at_the_data(families, model, steps):
    times = [1000 - i * 1000 // steps - 1 for i in range(steps)]
    assert times[0] == 999
    sampler = Sampler("DDIMScheduler", DDIM.config, steps, 0.0)
    expected = walk(families[model], zip(times, [*times[1:], None], strict=True))
    torch.testing.assert_close(make_images(families[model], sampler), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", list(MODELS))
def test_tcd_without_noise_ends_at_the_first_timestep(families, model):
    times = [999, 759, 499, 259]
    expected = walk(families[model], zip(times, [*times[1:], 0], strict=True))
    torch.testing.assert_close(make_images(families[model], TCD), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", ["epsilon", "v"])
def test_euler_trailing_is_ddim_from_slightly_less_noise(families, model):
    """Its first sample is sigma_T eps, not eps, at the last time."""
    family, times = families[model], [999, 749, 499, 249]
    sigma = float(family.schedule.sigma(torch.tensor(999)))
    assert sigma == pytest.approx(0.99766, abs=1e-4)
    expected = walk(family, zip(times, [*times[1:], None], strict=True), scale=sigma)
    torch.testing.assert_close(make_images(family, EULER), expected, rtol=0, atol=1e-4)


def test_euler_with_zero_snr_starts_close_to_pure_noise(families):
    """Its sigma must be finite: alpha^2 = 2^-24."""
    times = [999, 749, 499, 249]
    expected = walk(families["zero_snr"], zip(times, [*times[1:], None], strict=True))
    torch.testing.assert_close(make_images(families["zero_snr"], EULER), expected, rtol=0, atol=2e-3)


def test_eta_of_tcd_reaches_the_scheduler(families):
    family = families["epsilon"]
    noisy, quiet = make_images(family, TCD_NOISY), make_images(family, TCD)
    assert (noisy - quiet).abs().max() > 1e-3
    torch.testing.assert_close(noisy, make_images(family, TCD_NOISY))


def test_the_network_is_called_at_the_times_of_the_sampler(families):
    family = families["epsilon"]
    network = family.load_network()
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    for sampler in SAMPLERS.values():
        seen.clear()
        make_images(family, sampler, network)
        first = [999, 759, 499, 259] if sampler.scheduler in ("TCDScheduler", "LCMScheduler") else [999, 749, 499, 249]
        assert seen == first, sampler


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("model", list(MODELS))
def test_every_sampler_runs_and_is_exported_as_it_ran(families, tmp_path, model, name):
    """The exported scheduler, loaded by plain diffusers into a plain pipeline, makes the engine's images."""
    import diffusers
    from diffusers import StableDiffusionXLPipeline

    family, sampler = families[model], SAMPLERS[name]
    expected = make_images(family, sampler)
    assert torch.isfinite(expected).all()
    student = family.student_network(family.load_network(), guidance_embedding=False)
    family.export(student, tmp_path, ExportInfo(sampler, "full"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert type(pipe.scheduler) is getattr(diffusers, sampler.scheduler)
    config = pipe.scheduler.config
    assert not config.get("clip_sample", False)
    assert config.get("set_alpha_to_one", True)
    assert config.prediction_type == MODELS[model][0]
    assert config.rescale_betas_zero_snr == MODELS[model][1]
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    arguments = {"num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "pt", **SIZE, **sampler.call}
    images = pipe(PROMPTS, generator=generators, **arguments).images
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


def test_the_models_spacing_stays_unless_the_sampler_has_its_own(families):
    family = families["epsilon"]
    leading = family.scheduler(Sampler("DDIMScheduler", {}, 4, 0.0)).config
    assert (leading.timestep_spacing, leading.steps_offset) == ("leading", 1)
    trailing = family.scheduler(DDIM).config
    assert (trailing.timestep_spacing, trailing.steps_offset) == ("trailing", 1)
    assert not family.scheduler(DDIM).config.clip_sample
    own = family.scheduler(Sampler("DDIMScheduler", {"set_alpha_to_one": False}, 4, 0.0)).config
    assert not own.set_alpha_to_one
