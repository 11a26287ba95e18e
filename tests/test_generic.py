"""The family for pipelines that have none: descriptions are compared with the pipeline, and students are its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.engine.lora_layers import without_weights
from distill.core.engine.networks import Networks
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExportInfo, LoraSettings, ModelSettings
from distill.core.plugin_api.method import Role
from distill.core.plugin_api.precision import BASE, Precisions
from distill.core.registry.registry import Registry
from support.in_float64 import ROUNDING, draw_as_in_float32, in_float64
from support.tiny_families import EDGE, MODELS
from support.tiny_parts import SHORT
from support.tiny_undescribed import OVIS, UNDESCRIBED, write_tiny_ovis

PROMPTS = ["a red fox", "two blue boats on a lake"]
KNOWN = {
    "sd1x": {
        "denoiser_call": {"sample": "latents", "timestep": "time", "encoder_hidden_states": "prompt_embeds"},
    },
    "sd3": {
        "denoiser_call": {
            "hidden_states": "latents", "timestep": "time", "encoder_hidden_states": "prompt_embeds",
            "pooled_projections": "pooled_prompt_embeds",
        },
        "embeddings": ["prompt_embeds", "-", "pooled_prompt_embeds"], "encode_call": SHORT,
    },
    "flux-schnell": {
        "denoiser_call": {
            "hidden_states": "latents", "timestep": "time", "encoder_hidden_states": "prompt_embeds",
            "pooled_projections": "pooled_prompt_embeds", "txt_ids": "text_ids", "img_ids": "image_ids",
        },
        "embeddings": ["prompt_embeds", "pooled_prompt_embeds"], "encode_call": SHORT, "packing": "patches",
        "time_input": "fraction", "guidance_argument": "true_cfg_scale",
    },
}  # fmt: skip
"""Models that have a family of their own -> their description."""


def described(folder, description, **settings):
    kind = Registry.load(installed=False).get("family", "generic")
    return kind(kind.Config(**description), ModelSettings(source=str(folder), resolution=(EDGE, EDGE), **settings))


def used(family):
    family.check_source()
    family.encode_prompts(["a fox"])


@pytest.fixture(scope="module", params=KNOWN)
def known(request, tmp_path_factory):
    """(a model, its own family, the family of its description)."""
    tiny = MODELS[request.param]
    folder = tiny.write(tmp_path_factory.mktemp("known") / "model")
    return folder, tiny.make(folder), described(folder, KNOWN[request.param])


@pytest.fixture(scope="module", params=UNDESCRIBED)
def unknown(request, tmp_path_factory):
    """(a model without a family, its description)."""
    write, description = UNDESCRIBED[request.param]
    return write(tmp_path_factory.mktemp("unknown") / "model"), description


@pytest.fixture(scope="module")
def ovis(tmp_path_factory):
    return write_tiny_ovis(tmp_path_factory.mktemp("ovis") / "model")


def test_a_description_gives_what_the_models_own_family_gives(known):
    _, own, generic = known
    generic.check_source()
    embeds, ours = own.encode_prompts(PROMPTS), generic.encode_prompts(PROMPTS)
    assert ours.keys() == embeds.keys()
    for key, expected in embeds.items():
        torch.testing.assert_close(ours[key], expected)
    network, times = own.load_network(), torch.tensor([312.5, 987.0])
    double, x_t = own.load_network().double(), torch.randn(2, own.latent_channels, 16, 16, dtype=torch.float64)
    exact = {key: value.double() for key, value in embeds.items()}
    with torch.no_grad():
        expected = own.predict(double, x_t, times, exact)
        found = generic.predict(double, x_t, times, exact)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
    call = {"sampler": None, "seeds": [3, 8], "width": EDGE, "height": EDGE, "num_inference_steps": 3}
    for scale in (1.0, 4.0):
        theirs = own.generate(network, embeds, guidance_scale=scale, **call)
        torch.testing.assert_close(generic.generate(network, embeds, guidance_scale=scale, **call), theirs)


def test_a_pipeline_without_a_family_makes_its_own_images(unknown, monkeypatch):
    """In float64, text encoders and autoencoder included."""
    import diffusers

    draw_as_in_float32(monkeypatch)
    folder, description = unknown
    family = described(folder, description)
    family.check_source()
    family = in_float64(family)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    further = {**description.get("pipeline_call", {}), **description["encode_call"]}
    sizes = {"width": EDGE, "height": EDGE, "num_inference_steps": 3}
    for scale in (1.0, 4.0):
        ours = family.generate(
            family.load_network(), family.encode_prompts(PROMPTS), sampler=None, seeds=[3, 8], guidance_scale=scale,
            **sizes,
        )  # fmt: skip
        for prompt, seed, image in zip(PROMPTS, (3, 8), ours, strict=True):
            generator = torch.Generator().manual_seed(seed)
            call = {**sizes, **further, "guidance_scale": scale, "generator": generator, "output_type": "pt"}
            expected = pipeline(prompt, negative_prompt="", **call).images[0]
            torch.testing.assert_close(image.double(), expected, rtol=0, atol=ROUNDING)


def test_without_a_description_the_pipelines_own_calls_are_proposed(unknown):
    folder, description = unknown
    kept = {key: description[key] for key in ("embeddings", "encode_call", "pipeline_call") if key in description}
    kept["latents_at_once"] = description.get("latents_at_once", 1000)
    with pytest.raises(UserError, match="denoiser_call is not given") as refused:
        described(folder, {**kept, "packing": description.get("packing", "none")}).encode_prompts(["a fox"])
    proposal = json.loads(str(refused.value)[str(refused.value).index("{") :])
    assert proposal["denoiser_call"] == description["denoiser_call"]
    described(folder, {**kept, **proposal}).encode_prompts(["a fox"])  # which is right


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"time_input": "timesteps"}, r"timestep is 1\.0, not 1000\.0"),
        ({"time_input": "reversed"}, r"timestep is 1\.0, not 0\.0"),
        ({"output": "negated"}, r"the negative of the one described \(output\)"),
        ({"guidance_offset": 1.0}, r"it guides otherwise than uncond \+ s \(cond - uncond\)"),
        ({"embeddings": ["-", "prompt_embeds"]}, r"returns no tensor for prompt_embeds"),
        ({"guidance_argument": "true_cfg_scale"}, r"OvisImagePipeline takes no true_cfg_scale"),
        ({"denoiser_call": {**OVIS["denoiser_call"], "txt_ids": "text_ids"}}, r"txt_ids is a tensor \(200, 3\), not"),
        ({"denoiser_call": {**OVIS["denoiser_call"], "guidance": [3.5]}}, r"it does not give the network guidance"),
        ({"denoiser_call": {"hidden_states": "latents"}}, r"it gives the network encoder_hidden_states = a tensor"),
        ({"denoiser_call": {**OVIS["denoiser_call"], "timestep": "clock"}}, r"'clock' is nothing that the network can"),
        ({"encode_call": {"max_sequence_length": 200, "prompt_embeds": True}}, r"encode_prompt cannot be called as it"),
        ({"packing": "none"}, r"takes 32 channels, and its autoencoder's latents have 8(?s:.*)packing to patches"),
        ({"denoiser": "unet"}, r"a denoiser \(unet\), a vae and a scheduler are needed"),
    ],
)  # fmt: skip
def test_a_description_that_is_not_the_pipelines_is_refused(ovis, wrong, said):
    with pytest.raises(UserError, match=said):
        used(described(ovis, {**OVIS, **wrong}))


def test_zeros_may_be_the_unconditional_for_which_the_pipeline_has_no_word(ovis):
    family = described(ovis, {**OVIS, "uncond": "zeros"})
    used(family)
    embeds = family.encode_prompts(PROMPTS)
    assert not any(value.any() for key, value in family.uncond(embeds).items() if key.startswith("prompt_embeds"))
    expected = described(ovis, OVIS).encode_prompts([""])
    assert torch.equal(described(ovis, OVIS).uncond(embeds)["prompt_embeds"][0], expected["prompt_embeds"][0])


def test_a_quantised_base_says_about_the_same(ovis):
    kind = Registry.load(installed=False).get("quantizer", "int8-quanto")
    family, plain = described(ovis, OVIS, precision=Precisions({BASE: kind(kind.Config())})), described(ovis, OVIS)
    embeds, times = plain.encode_prompts(PROMPTS), torch.tensor([312.5, 987.0])
    x_t = torch.randn(2, plain.latent_channels, EDGE // plain.scale_factor, EDGE // plain.scale_factor)
    with torch.no_grad():
        expected = plain.predict(plain.load_network(), x_t, times, embeds)
        quantised = family.predict(family.load_network(), x_t, times, embeds)
    before, after = family.settings.precision.stored(BASE)
    assert after < 0.8 * before
    assert 0 < (quantised - expected).norm() < 0.1 * expected.norm()


def test_layers_inside_the_blocks_are_adapted_unless_some_are_named(ovis):
    family = described(ovis, OVIS)
    network = family.load_network()
    names = {name for name, _ in network.named_modules()}
    assert set(family.lora_targets) <= names
    assert all(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in family.lora_targets)
    assert "single_transformer_blocks.1.proj_out" in family.lora_targets
    assert not without_weights(network, family.lora_targets)
    assert described(ovis, {**OVIS, "lora_layers": ["to_q"]}).lora_targets == ("to_q",)


def test_a_full_student_is_a_model_of_its_pipeline(unknown, tmp_path, monkeypatch):
    """In float64."""
    import diffusers

    draw_as_in_float32(monkeypatch)
    folder, description = unknown
    family = in_float64(described(folder, description))
    student = family.student_network(family.load_network(), guidance_embedding=False)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.01)
    student = student.double()
    sampler = Sampler(
        "FlowMatchEulerDiscreteScheduler", {"shift": 1.0, "use_dynamic_shifting": False}, 2, 0.0, {"sigmas": [1.0, 0.6]}
    )
    embeds = family.encode_prompts(PROMPTS[:1])
    ours = family.generate(student, embeds, sampler=sampler, seeds=[3], width=EDGE, height=EDGE)
    family.export(student, tmp_path, ExportInfo(sampler, "full"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path).to(torch.float64)
    snippet = family.usage_snippet(ExportInfo(sampler, "full"))
    times = {"timesteps": [1000.0, 600.0]} if "timesteps=[1000.0, 600.0]" in snippet else {"sigmas": [1.0, 0.6]}
    further = {**description.get("pipeline_call", {}), **description["encode_call"]}
    call = {"width": EDGE, "height": EDGE, "num_inference_steps": 2, "guidance_scale": 1.0, **times, **further}
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(PROMPTS[0], generator=generator, output_type="pt", **call).images
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=ROUNDING)


def test_a_lora_is_loaded_by_the_lines_of_its_card(unknown, tmp_path, monkeypatch):
    """One of them has a loader that knows a UNet alone, the other none."""
    folder, description = unknown
    family, shape = described(folder, description), LoraSettings(4, 8.0)
    networks = Networks(family, [Role("teacher"), Role("student", trains="lora")], lora=shape, seed=0)
    with torch.no_grad():
        for weight in networks.parameters("student"):
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    sampler = Sampler(
        "FlowMatchEulerDiscreteScheduler", {"shift": 1.0, "use_dynamic_shifting": False}, 2, 0.0, {"sigmas": [1.0, 0.6]}
    )
    call = {"sampler": sampler, "seeds": [3], "width": EDGE, "height": EDGE}
    embeds = family.encode_prompts(["a photo of a fox in the snow"])
    with networks.use("student") as network:
        ours = family.generate(network, embeds, **call)
        family.export(network, tmp_path / "student", ExportInfo(sampler, "lora", shape))
    with networks.use("teacher") as network:
        assert (family.generate(network, embeds, **call) - ours).abs().max() > 0.02
    monkeypatch.chdir(tmp_path)
    own = f"pipe(prompt, generator=torch.Generator().manual_seed(3), width={EDGE}, height={EDGE}, "
    further = "".join(f"{key}={value!r}, " for key, value in description["encode_call"].items())
    names = {}
    snippet = family.usage_snippet(ExportInfo(sampler, "lora", shape)).replace("pipe(prompt, ", own + further)
    exec(compile(snippet, "snippet", "exec"), names)
    found = torch.from_numpy(np.asarray(names["image"]).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, ours[0], rtol=0, atol=1.01 / 255)
