"""What is FLUX.2's own: a shift by resolution and steps, distilled models, inner states, times of half precision."""

from __future__ import annotations

import json
import math

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExportInfo, ModelSettings
from distill.model_families.calls.networks import as_multiplied
from distill.model_families.flux2 import Flux2
from support.tiny_flux2 import DEV, KLEIN, LENGTH, write_tiny_klein


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    return write_tiny_klein(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    return write_tiny_klein(tmp_path_factory.mktemp("distilled") / "model", distilled=True)


def at(folder, edge, **config):
    return Flux2(Flux2.Config(**config), ModelSettings(source=str(folder), resolution=(edge, edge)))


@pytest.mark.parametrize(
    ("edge", "steps", "mu"), [(128, 50, 2.02335), (128, 4, 2.29118), (32, 50, 1.62161), (140, 4, 1.28609)]
)
def test_a_run_has_the_shift_of_its_resolution_and_of_a_number_of_steps(klein, edge, steps, mu):
    """128 pixels of the tiny model are the 64 x 64 patches of 1024 real ones; past 4300 patches steps do not count."""
    family = at(klein, edge, shift_steps=steps)
    assert family.shift_of((edge // 2) ** 2) == pytest.approx(mu, abs=1e-5)
    assert family.noise_config["shift"] == pytest.approx(math.exp(mu), rel=1e-5)
    assert not family.noise_config["use_dynamic_shifting"]
    assert at(klein, edge).noise_config["shift"] == at(klein, edge, shift_steps=50).noise_config["shift"]


@pytest.mark.parametrize("steps", [4, 50])
def test_the_run_has_the_times_of_the_teachers_own_scheduler_at_that_number_of_steps(klein, steps):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    own = at(klein, 64).scheduler(None)
    even = torch.linspace(1, 1 / steps, steps)
    own.set_timesteps(sigmas=even.tolist(), mu=compute_empirical_mu(32 * 32, steps))
    ours = at(klein, 64, shift_steps=steps).scheduler(Sampler("FlowMatchEulerDiscreteScheduler", {}, steps, 1.0))
    ours.set_timesteps(sigmas=even.tolist(), mu=0.3)
    torch.testing.assert_close(ours.sigmas, own.sigmas)


def test_distilled_models_are_not_guided_and_their_students_say_so(klein, distilled, tmp_path):
    base, fast = KLEIN.make(klein), KLEIN.make(distilled)
    assert (base.usual_guidance, base.default_steps) == (4.0, 50)
    assert (fast.usual_guidance, fast.default_steps) == (1.0, 4)
    assert fast.shift_of(256) == at(klein, 32, shift_steps=4).shift_of(256)
    student = fast.student_network(fast.load_network(), guidance_embedding=False)
    fast.export(student, tmp_path, ExportInfo(Sampler("FlowMatchEulerDiscreteScheduler", {}, 2, 0.0), "full"))
    assert json.loads((tmp_path / "model_index.json").read_text())["is_distilled"] is True


def test_layers_after_the_last_that_is_read_are_not_computed(klein):
    family = KLEIN.make(klein)
    encoder, counted = family._text_encoders().encoders["text_encoder"], []
    for layer in encoder.model.layers:
        layer.register_forward_hook(lambda module, args, output: counted.append(module))
    assert family.encode_prompts(["a fox"])["prompt_embeds"].shape == (1, LENGTH, 48)
    assert len(counted) == 27 < len(encoder.model.layers)


def test_a_network_of_half_precision_is_told_the_times_of_its_pipeline():
    """The pipeline divides and multiplies in bf16; the latents, by whose type the network multiplies, are fp32 here."""
    times = torch.linspace(1, 1000, 400)
    theirs = (times.bfloat16() / 1000) * 1000
    told = as_multiplied(times.bfloat16() / 1000, torch.float32)
    assert told.dtype == torch.float32
    torch.testing.assert_close(told * 1000, theirs.float(), rtol=1e-6, atol=0)
    assert as_multiplied(told, torch.float32) is told


def test_models_of_the_other_pipeline_are_refused_with_their_family(klein, tmp_path):
    with pytest.raises(UserError, match=r"is a Flux2KleinPipeline, not a FLUX.2 dev(?s:.)*set model_family to flux2$"):
        DEV.make(klein).check_source()
