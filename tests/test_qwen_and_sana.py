"""What is special in the families qwen-image, qwen-image-2 and sana."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.errors import UserError
from distill.core.plugin_api.family import MicroConditioning
from distill.core.testing.sampling_loops import GUIDED, UNGUIDED, loop_is_generate
from distill.model_families.calls.pixels import decoding_bytes
from safetensors.torch import load_file, save_file
from support.tiny_families import EDGE, NEWER
from support.tiny_sana import LENGTH

PROMPTS = ["a red fox", "two blue boats on a lake"]
VARIANTS = ("qwen-image", "qwen-image-2", "sana", "sana-1.5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: NEWER[name].write(root / name) for name in VARIANTS}


@pytest.fixture(scope="module")
def families(folders):
    return {name: NEWER[name].make(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("guidance", [UNGUIDED, GUIDED])
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_along_the_guided_teacher_are_the_pipelines_images(families, name, guidance):
    """Also where the pipeline keeps the length of the conditional prediction (qwen-image)."""
    family = families[name]
    embeds = family.encode_prompts(PROMPTS)

    def made(*, size):
        return type(family)(family.config, replace(family.settings, resolution=size))

    def conditioning(*, original, crop, size):
        return family.condition(embeds, MicroConditioning([size] * 2, [(crop, crop)] * 2, [size] * 2))

    loop_is_generate(SimpleNamespace(make=made, edge=EDGE, embeds=embeds, conditioning=conditioning), guidance)


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-2"])
def test_times_that_a_method_names_are_not_stretched_to_the_models_last_one(families, name):
    family = families[name]
    assert family.scheduler_config["shift_terminal"] == 0.02
    sampler = Sampler("FlowMatchEulerDiscreteScheduler", {"shift": 1.0, "use_dynamic_shifting": False}, 2, 0.0)
    scheduler = family.scheduler(sampler)
    scheduler.set_timesteps(sigmas=[1.0, 0.6])
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 600])
    own = family.scheduler(None)
    own.set_timesteps(sigmas=[1.0, 0.6], mu=1.0)
    assert float(own.sigmas[1]) == pytest.approx(0.02)


def test_a_solver_that_is_set_to_a_flow_makes_the_teachers_images_and_students_have_the_flow(families):
    family = families["sana"]
    assert family.prediction_type == "flow"
    assert (family.schedule.shift, family.schedule.num_train_timesteps) == (3.0, 1000)
    assert isinstance(family.scheduler(None), diffusers.DPMSolverMultistepScheduler)
    student = family.scheduler(Sampler("FlowMatchEulerDiscreteScheduler", {}, 4, 0.0))
    assert student.config.shift == 3.0


def test_prompts_to_stay_away_from_have_no_instruction(families, folders):
    family = families["sana"]
    pipeline = diffusers.SanaPipeline.from_pretrained(folders["sana"])
    with torch.no_grad():
        theirs = pipeline.encode_prompt(
            PROMPTS, negative_prompt=["Blurry ", ""], device="cpu", max_sequence_length=LENGTH
        )
    ours = family.encode_negative(["Blurry ", ""])
    assert torch.equal(ours["prompt_embeds"], theirs[2])
    assert torch.equal(ours["prompt_attention_mask"], theirs[3])
    assert not torch.equal(family.encode_prompts(["Blurry "])["prompt_embeds"], ours["prompt_embeds"][:1])
    assert family.max_prompt_tokens == LENGTH - 2


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-2"])
def test_the_limit_of_a_prompt_is_where_its_states_no_longer_change(families, name):
    family = families[name]
    full = "x" * (family.max_prompt_tokens or 0)
    one, same, other = (family.encode_prompts([text])["prompt_embeds"] for text in (full, full + "y", "y" + full[1:]))
    whole = family.encode_prompts([full])["prompt_embeds_mask"]
    assert whole.all()
    assert not torch.equal(one, other)
    assert torch.equal(family.encode_prompts([full[:-1]])["prompt_embeds_mask"].sum(), whole.sum() - 1)
    assert (one - same)[:, : len(full)].abs().max() < 1e-5, "causal: what is cut off changes nothing before it"


def test_text_encoders_load_from_the_layouts_of_older_and_newer_libraries(families, folders, tmp_path):
    expected = families["qwen-image"].encode_prompts(PROMPTS)["prompt_embeds"]
    folder = shutil.copytree(folders["qwen-image"], tmp_path / "qwen")
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    assert "model.layers.0.mlp.up_proj.weight" in state, "as published: the language model is the model"
    newer = {key.replace("model.", "model.language_model."): value for key, value in state.items()}
    newer = {f"model.{key}" if key.startswith("visual.") else key: value for key, value in newer.items()}
    save_file(newer, file, metadata={"format": "pt"})
    family = NEWER["qwen-image"].make(folder)
    family.check_source()
    assert torch.equal(family.encode_prompts(PROMPTS)["prompt_embeds"], expected)
    expected = families["sana"].encode_prompts(PROMPTS)["prompt_embeds"]
    folder = shutil.copytree(folders["sana"], tmp_path / "sana")
    file = folder / "text_encoder" / "model.safetensors"
    save_file({f"model.{key}": value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    family = NEWER["sana"].make(folder)  # of Gemma2ForCausalLM
    family.check_source()
    assert torch.equal(family.encode_prompts(PROMPTS)["prompt_embeds"], expected)


def test_a_student_of_sana_sprint_is_refused_as_a_teacher(folders, tmp_path):
    folder = shutil.copytree(folders["sana-1.5"], tmp_path / "sprint")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "guidance_embeds": True}))
    with pytest.raises(UserError, match=r"guidance_embeds\), as Sana Sprint does(?s:.)*SANA1.5_1.6B"):
        NEWER["sana-1.5"].make(folder).check_source()


def test_a_processor_without_its_package_is_refused_with_what_it_needs(folders, monkeypatch):
    import transformers

    def missing(*args, **kwargs):
        raise ImportError("\nQwen3VLVideoProcessor requires the Torchvision library but it was not found. More.")

    family = NEWER["qwen-image-2"].make(folders["qwen-image-2"])
    monkeypatch.setattr(transformers.Qwen3VLProcessor, "from_pretrained", missing)
    with pytest.raises(UserError, match=r"processor cannot be loaded: Qwen3VL.* Torchvision(?s:.)*with pip"):
        family.encode_prompts(PROMPTS)


def test_sanas_autoencoder_decodes_with_its_gradient_a_layer_computed_again(families):
    family = families["sana"]
    z = torch.randn(1, family.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pixels = family.decode_pixels(z)
    (ours,) = torch.autograd.grad((pixels**2).sum(), z)
    vae = family._autoencoder()
    plain = vae.decode(z / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
    (theirs,) = torch.autograd.grad((plain**2).sum(), z)
    torch.testing.assert_close(pixels, plain)
    torch.testing.assert_close(ours, theirs)
    assert theirs.abs().min() > 0


def test_sanas_autoencoder_at_1024_pixels_is_estimated_as_it_was_measured():
    """2.41 GB at 512 x 512 in fp32 beside the weights' 1.25 GB, four times that at 1024 x 1024."""
    published = {
        "_class_name": "AutoencoderDC", "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "downsample_block_type": "conv", "upsample_block_type": "interpolate",
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    }  # fmt: skip
    assert decoding_bytes(published, 1024**2, item=4) == pytest.approx(4 * 2.41e9 + 1.25e9, rel=0.05)
