"""The family makes what its pipeline in diffusers makes."""

import pytest
import torch
from diffusers import OvisImagePipeline
from distill import ModelSettings
from distill.model_families import pack
from distill_studio.ovis_image import EDGE, OvisImage

PROMPTS = ["a fox in the snow", "a harbour"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return OvisImage.example(tmp_path_factory.mktemp("ovis"))


@pytest.fixture(scope="module")
def family(folder):
    return OvisImage(OvisImage.Config(), ModelSettings(source=str(folder)))


def test_prompts_are_encoded_as_the_pipeline_does(family, folder):
    embeds = OvisImagePipeline.from_pretrained(folder).encode_prompt(PROMPTS, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(family.encode_prompts(PROMPTS)["prompt_embeds"], embeds)


def test_images_are_those_of_the_pipeline(family, folder):
    """So that noise, times, guidance and the unconditional are right."""
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "width": EDGE, "height": EDGE}
    network, embeds = family.load_network(), family.encode_prompts(PROMPTS)
    ours = family.generate(network, embeds, sampler=None, seeds=[3, 4], **call)
    noise = torch.cat([torch.randn(1, 4, EDGE // 2, EDGE // 2, generator=torch.manual_seed(seed)) for seed in (3, 4)])
    pipeline = OvisImagePipeline.from_pretrained(folder)
    theirs = pipeline(PROMPTS, latents=pack(noise), output_type="pt", **call).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.05, "an image, not a plain area"


def test_one_call_of_the_network_is_the_pipelines(family):
    """At half noise: the network is told t in [0, 1], the schedule of flows counts to 1000."""
    network, told = family.load_network(), {}
    network.register_forward_pre_hook(lambda module, args, kwargs: told.update(kwargs), with_kwargs=True)
    cond = family.encode_prompts(["a fox"])
    half = family.schedule.network_time(torch.tensor([0.5]))
    output = family.predict(network, torch.zeros(1, 4, 16, 16), half, cond)
    assert output.shape == (1, 4, 16, 16)
    assert told["timestep"].tolist() == [0.5]
