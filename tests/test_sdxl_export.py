"""Students on disk: loaded in plain diffusers they make the same images; LoRAs compose; teachers carry theirs."""

from __future__ import annotations

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExportInfo, ExtraLora, LoraSettings, ModelSettings
from distill.model_families.bases.unet import LORA_TARGETS
from distill.model_families.sdxl import SDXL
from support.in_float64 import ROUNDING, draw_as_in_float32, in_float64
from support.tiny_sdxl import EDGE, write_tiny_sdxl

PROMPTS = ["a red fox", "two boats"]
SEEDS = [3, 8]
LCM = Sampler("LCMScheduler", {"original_inference_steps": 50, "timestep_scaling": 10.0}, 3, 0.0)
INFO = ExportInfo(LCM, "lora", LoraSettings(4, 12.0), metadata={"method": "lcm"})
SIZE = {"width": EDGE, "height": EDGE}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    """(folder of an exported LoRA student, its images)."""
    folder = tmp_path_factory.mktemp("run") / "student"
    family = make(tiny)
    network = with_adapter(family.load_network(), "student")
    images = family.generate(network, family.encode_prompts(PROMPTS), sampler=LCM, seeds=SEEDS, **SIZE)
    family.export(network, folder, INFO)
    return folder, images


@pytest.fixture(scope="module")
def style(tiny, tmp_path_factory):
    """A user's LoRA with parts for the UNet and both text encoders."""
    return write_style(tiny, tmp_path_factory.mktemp("style"))


def make(folder, config=None, **settings):
    return SDXL(SDXL.Config(**(config or {})), ModelSettings(source=str(folder), **settings))


def plain(folder, **arguments):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_images(pipeline, **arguments):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings = {"num_inference_steps": 3, "guidance_scale": 0.0, **SIZE, **arguments}
    return pipeline(PROMPTS, generator=generators, output_type="pt", **settings).images


def with_adapter(network, name, *, rank=4, alpha=12.0, targets=LORA_TARGETS, seed=0):
    """An adapter whose weights are all random, as after training."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False)
        network.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in network.named_parameters():
        if f".{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return network


def write_style(tiny, folder):
    from diffusers import StableDiffusionXLPipeline
    from peft.utils import get_peft_model_state_dict

    pipeline = plain(tiny)
    with_adapter(pipeline.unet, "default", rank=2, alpha=2.0, targets=["to_q", "to_v"], seed=1)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        with_adapter(encoder, "default", rank=2, alpha=4.0, targets=["q_proj", "v_proj"], seed=2)
    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
    metadata = {f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() for name, part in parts.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def lcm(pipeline, folder):
    from diffusers import LCMScheduler

    pipeline.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipeline


# -- LoRA -------------------------------------------------------------------------------------------------------------


def test_an_exported_lora_makes_the_same_images_in_plain_diffusers(tiny, tmp_path, monkeypatch):
    """With alpha three times the rank, on convolutions and linear layers alike; in float64."""
    draw_as_in_float32(monkeypatch)
    family = in_float64(make(tiny))
    network = with_adapter(family.load_network(), "student").double()
    expected = family.generate(network, family.encode_prompts(PROMPTS), sampler=LCM, seeds=SEEDS, **SIZE).double()
    family.export(network, tmp_path, INFO)
    pipeline = lcm(plain(tiny).to(torch.float64), tmp_path)
    without = make_images(pipeline)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(make_images(pipeline), expected, rtol=0, atol=ROUNDING)
    assert (without - expected).abs().max() > 0.05, "the adapter does something"
    config = pipeline.unet.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (4, 4), "the scale is in the weights"


def test_an_exported_scheduler_is_complete(student):
    from diffusers import LCMScheduler

    config = LCMScheduler.from_pretrained(student[0], subfolder="scheduler").config
    assert config.original_inference_steps == 50
    assert config.timestep_scaling == 10.0
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")


def test_metadata_lies_in_the_header_of_the_lora(student):
    from safetensors import safe_open

    with safe_open(student[0] / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["method"] == "lcm"
    assert "lora_adapter_metadata" in metadata


def test_the_chosen_adapter_is_exported(tiny, tmp_path):
    family = make(tiny)
    network = with_adapter(family.load_network(), "student", seed=3)
    with_adapter(network, "fake_score", rank=2, seed=4)
    family.export(network, tmp_path, ExportInfo(LCM, "lora", adapter="fake_score"))
    pipeline = plain(tiny)
    pipeline.load_lora_weights(tmp_path)
    assert pipeline.unet.peft_config["default_0"].r == 2


def test_load_student_gives_back_the_trained_network(tiny, student):
    folder, expected = student
    family = make(tiny)
    network = family.load_student(folder)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    ours = family.generate(network, family.encode_prompts(PROMPTS), sampler=LCM, seeds=SEEDS, **SIZE)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_a_student_can_be_attached_to_another_base_under_any_name(tiny, student):
    """For a run that starts from an earlier student."""
    folder, expected = student
    family = make(tiny)
    network = family.load_network()
    family.attach_adapter(network, str(folder), "init")
    assert network.active_adapters() == ["init"]
    ours = family.generate(network, family.encode_prompts(PROMPTS), sampler=LCM, seeds=SEEDS, **SIZE)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_a_folder_that_holds_no_student_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="holds no student"):
        make(tiny).load_student(tmp_path)


def test_extra_loras_compose_with_the_student(tiny, student, style):
    folder, _ = student
    family = make(tiny)
    network = family.load_student(folder, extra_loras=[ExtraLora(str(style), 0.6)])
    ours = family.generate(network, family.encode_prompts(PROMPTS), sampler=LCM, seeds=SEEDS, **SIZE)
    pipeline = lcm(plain(tiny), folder)
    pipeline.load_lora_weights(folder, adapter_name="student")
    alone = make_images(pipeline)
    pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.set_adapters(["student", "style"], [1.0, 0.6])
    expected = make_images(pipeline)
    assert (alone - expected).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    assert family.fingerprint("text") != make(tiny).fingerprint("text")


def test_a_student_works_in_the_controlnet_pipeline(tiny, student):
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    folder, _ = student
    parts = plain(tiny).components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_channels=3, load_weights_from_unet=True)
        for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.1)
    # the hint is scaled down by 8 inside; the tiny autoencoder scales by 2
    for block in controlnet.controlnet_cond_embedding.blocks:
        block.stride = (1, 1)
    controlnet.controlnet_cond_embedding.conv_in.stride = (2, 2)
    names = ("feature_extractor", "image_encoder")
    parts = {name: part for name, part in parts.items() if name not in names}
    pipeline = lcm(StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet), folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    hint = torch.rand(2, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0))

    def controlled(scale):
        return make_images(pipeline, image=hint, controlnet_conditioning_scale=scale)

    torch.testing.assert_close(controlled(0.0), student[1], rtol=0, atol=2e-5)
    assert (controlled(1.0) - student[1]).abs().max() > 1e-3


# -- teacher LoRA -----------------------------------------------------------------------------------------------------


def test_a_teacher_lora_is_part_of_the_teacher(tiny, style):
    """UNet and both text encoders, at its weight, with no adapter left behind."""
    family = make(tiny, teacher_lora=((str(style), 0.7),))
    family.check_source()
    network = family.load_network()
    assert not any("lora" in name for name, _ in network.named_parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    pipeline = plain(tiny)
    without = make_images(pipeline)
    pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.set_adapters(["style"], [0.7])
    expected = make_images(pipeline)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS)
    ours = family.encode_prompts(PROMPTS)
    torch.testing.assert_close(ours["prompt_embeds"], embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["pooled_prompt_embeds"], pooled, rtol=0, atol=1e-5)
    images = family.generate(
        network, ours, sampler=None, seeds=SEEDS, num_inference_steps=3, guidance_scale=0.0, **SIZE
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    assert (without - expected).abs().max() > 1e-3
    with_adapter(network, "student")


def test_several_teacher_loras_add_up(tiny, style, student):
    both = make(tiny, teacher_lora=((str(style), 0.7), (str(student[0]), -0.4))).load_network()
    base = make(tiny).load_network().state_dict()
    one = make(tiny, teacher_lora=((str(style), 0.7),)).load_network().state_dict()
    other = make(tiny, teacher_lora=((str(student[0]), -0.4),)).load_network().state_dict()
    for key, value in both.state_dict().items():
        torch.testing.assert_close(value, one[key] + other[key] - base[key], rtol=0, atol=1e-6)


def test_teacher_loras_change_the_fingerprints_of_what_they_change(tiny, style):
    plain_family, fused = make(tiny), make(tiny, teacher_lora=((str(style), 0.7),))
    assert fused.fingerprint("text") != plain_family.fingerprint("text")
    assert fused.fingerprint("denoiser") != plain_family.fingerprint("denoiser")
    assert fused.fingerprint("vae") == plain_family.fingerprint("vae")
    assert fused.fingerprint("denoiser") != make(tiny, teacher_lora=((str(style), 0.8),)).fingerprint("denoiser")


@pytest.mark.parametrize("block", ["down_blocks_1_attentions_0", "input_blocks_4_1"])
def test_a_lora_in_kohyas_format_keeps_its_alpha(tiny, tmp_path, block):
    """Blocks named as diffusers does, or as the original code."""
    from safetensors.torch import save_file

    name = f"lora_unet_{block}_transformer_blocks_0_attn1_to_q"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "kohya.safetensors")
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    before = make(tiny).load_network().state_dict()[key]
    after = make(tiny, teacher_lora=((str(tmp_path), 0.5),)).load_network().state_dict()[key]
    torch.testing.assert_close(after, before + 0.5 * (1.0 / 2) * up @ down)


def test_loras_that_do_not_fit_are_refused(tiny, tmp_path):
    from safetensors.torch import save_file

    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    save_file({f"{key}A.weight": torch.randn(2, 99), f"{key}B.weight": torch.randn(99, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not fit this model"):
        make(tiny, teacher_lora=((str(tmp_path / "a.safetensors"), 1.0),)).load_network()
    save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds nothing for an SDXL"):
        make(tiny, teacher_lora=((str(tmp_path / "b.safetensors"), 1.0),)).load_network()


# -- full -------------------------------------------------------------------------------------------------------------


def test_a_full_student_with_a_guidance_embedding_reloads_and_equals(tiny, tmp_path, monkeypatch):
    """The pipeline feeds the scale minus one by itself; images differ between scales. In float64."""
    draw_as_in_float32(monkeypatch)
    family = in_float64(make(tiny))
    student = family.student_network(family.load_network(), guidance_embedding=True)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    student = student.double()
    sampler = Sampler("LCMScheduler", {"original_inference_steps": 50}, 3, 8.0)
    embeds = family.encode_prompts(PROMPTS)
    expected = family.generate(student, embeds, sampler=sampler, seeds=SEEDS, **SIZE)
    family.export(student, tmp_path, ExportInfo(sampler, "full", metadata={"method": "lcm"}))
    pipeline = plain(tmp_path).to(torch.float64)
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    assert pipeline.unet.config.time_cond_proj_dim == 256
    assert pipeline.config.force_zeros_for_empty_prompt
    torch.testing.assert_close(make_images(pipeline, guidance_scale=8.0), expected.double(), rtol=0, atol=ROUNDING)
    assert (make_images(pipeline, guidance_scale=4.0) - expected).abs().max() > 1e-3
    reloaded = make(tiny).load_student(tmp_path).double()
    ours = family.generate(reloaded, embeds, sampler=sampler, seeds=SEEDS, **SIZE)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)
    assert (tmp_path / "metadata.json").is_file()


@pytest.mark.parametrize("embedded", [True, False])
def test_a_full_student_teaches_unless_it_takes_the_guidance_scale(tiny, tmp_path, embedded):
    family = make(tiny)
    student = family.student_network(family.load_network(), guidance_embedding=embedded)
    family.export(student, tmp_path, ExportInfo(Sampler("LCMScheduler", {}, 3, 8.0 if embedded else 0.0), "full"))
    if not embedded:
        make(tmp_path).check_source()
        return
    with pytest.raises(UserError, match=r"time_cond_proj_dim = 256(?s:.)*cannot teach(?s:.)*made from") as caught:
        make(tmp_path).check_source()
    assert str(tmp_path) in str(caught.value)


# -- the lines that people paste --------------------------------------------------------------------------------------


def run(snippet, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(snippet, "snippet", "exec"), names)
    assert (folder / "fox.png").is_file()
    return names


def test_the_snippet_of_a_lora_student_runs(tiny, student, style, monkeypatch):
    family = make(tiny, teacher_lora=((str(style), 0.7),), vae=str(tiny / "vae"))
    snippet = family.usage_snippet(INFO)
    assert len(snippet.splitlines()) <= 20
    names = run(snippet, student[0].parent, monkeypatch)
    weight = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    fused = names["pipe"].unet.get_submodule(weight).get_base_layer().weight
    torch.testing.assert_close(fused, family.load_network().get_submodule(weight).weight)
    assert "default_0" in names["pipe"].unet.peft_config


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_the_snippet_of_a_full_student_runs(tmp_path, monkeypatch, prediction_type):
    family = make(write_tiny_sdxl(tmp_path / "model", prediction_type=prediction_type))
    flow = prediction_type == "flow"
    sampler = Sampler("FlowMatchLCMScheduler", {"shift": 1.0}, 2, 0.0, {"sigmas": [1.0, 0.5]}) if flow else LCM
    info = ExportInfo(sampler, "full")
    student = family.student_network(family.load_network(), guidance_embedding=False)
    family.export(student, tmp_path / "student", info)
    run(family.usage_snippet(info), tmp_path, monkeypatch)
