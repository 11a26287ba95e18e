"""Students with fewer blocks than their teacher: the right ones are kept, and they run, train and export.

Where the blocks that are left out do nothing in the teacher, the smaller student starts as the teacher, exactly.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from distill.core.errors import UserError
from distill.core.plugin_api.family import MicroConditioning
from support.config_files import distill, said
from support.small_run import execute, losses, write_run
from support.tiny_families import EDGE, MODELS, SCALE_FACTOR, Tiny
from support.tiny_sdxl import write_tiny_sdxl
from torch import nn

CHOSEN = {"sdxl": Tiny("sdxl", write_tiny_sdxl), **{name: MODELS[name] for name in ("sd2x-v", "sd3.5-without-t5")}}
CHOSEN["flux"] = MODELS["flux-dev"]
FEWER = {
    "sdxl": {"student_layers_per_block": 1, "student_mid_block": False},
    "sd2x-v": {"student_layers_per_block": [1, 2], "student_transformer_layers": [0, 0], "student_mid_block": False},
    "sd3.5-without-t5": {"student_num_layers": 2},
    "flux": {"student_num_layers": 1, "student_num_single_layers": 1},
}
IDLE = {
    "sdxl": r"mid_block|(down|up)_blocks\.\d\.(resnets|attentions)\.1\.",
    "sd2x-v": r"mid_block|(down|up)_blocks\.\d\.attentions|(down_blocks\.0|up_blocks\.1)\.resnets\.1\.",
    "sd3.5-without-t5": r"transformer_blocks\.1\.",
    "flux": r"(single_)?transformer_blocks\.0\.",
}
"""Names of what the smaller student leaves out."""


@pytest.fixture(scope="module", params=CHOSEN)
def case(request, tmp_path_factory):
    name = request.param
    return name, CHOSEN[name].write(tmp_path_factory.mktemp("smaller") / "model")


def inputs(family):
    edge = EDGE // SCALE_FACTOR
    x_t = torch.randn(2, family.latent_channels, edge, edge, generator=torch.Generator().manual_seed(0))
    cond = family.condition(
        family.encode_prompts(["a red fox", "two boats"]),
        MicroConditioning([(64, 48)] * 2, [(0, 0)] * 2, [(EDGE, EDGE)] * 2),
    )
    return x_t, torch.tensor([312.5, 987.0]), cond


def silence(network: nn.Module, pattern: str) -> None:
    """Let the modules with these names add nothing to what passes through them."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not re.match(pattern, name):
                continue
            if "conv_shortcut" in name:  # takes in a skip connection as well: hand on the first half alone
                parameter.zero_()
                if parameter.ndim > 1:
                    parameter[:, : len(parameter)] = torch.eye(len(parameter))[:, :, None, None]
            elif re.search(r"\.(conv2|proj_out|norm1\.linear|norm1_context\.linear|norm\.linear)\.", name):
                parameter.zero_()


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_a_smaller_student_starts_as_the_teacher_if_the_removed_blocks_do_nothing(case):
    name, folder = case
    family = CHOSEN[name].make(folder, FEWER[name])
    teacher = family.load_network()
    silence(teacher, IDLE[name])
    student = family.student_network(teacher, guidance_embedding=False, smaller=True)
    assert size(student) < 0.9 * size(teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    x_t, time, cond = inputs(family)
    with torch.no_grad():
        expected = family.predict(teacher, x_t, time, cond)
        torch.testing.assert_close(family.predict(student, x_t, time, cond), expected, rtol=1e-5, atol=1e-5)
        whole = family.student_network(teacher, guidance_embedding=False)
        assert size(whole) == size(teacher)


def test_attentions_keep_their_first_transformer_layers():
    from diffusers import UNet2DConditionModel
    from distill.model_families.calls.smaller import kept_unet_weights, smaller_unet_config
    from support.tiny_sdxl import unet_config

    torch.manual_seed(0)
    teacher = UNet2DConditionModel(**{**unet_config(), "transformer_layers_per_block": (1, 3)}).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if re.search(r"transformer_blocks\.[12]\..*(to_out\.0|ff\.net\.2)", name):
                parameter.zero_()
    config = smaller_unet_config(teacher.config, layers=None, depth=1, middle=True)
    student = UNet2DConditionModel.from_config(config).eval()
    student.load_state_dict(kept_unet_weights(teacher.state_dict(), teacher.config, config))
    added = {
        "text_embeds": torch.randn(2, teacher.add_embedding.linear_1.in_features - 48),
        "time_ids": torch.ones(2, 6),
    }
    states = torch.randn(2, 5, teacher.config.cross_attention_dim)
    call = {"encoder_hidden_states": states, "added_cond_kwargs": added, "return_dict": False}
    x_t, time = torch.randn(2, 4, 16, 16), torch.tensor([300, 900])
    with torch.no_grad():
        torch.testing.assert_close(student(x_t, time, **call)[0], teacher(x_t, time, **call)[0])
    assert size(student) < size(teacher)


def test_a_smaller_students_weights_are_its_own(case):
    name, folder = case
    family = CHOSEN[name].make(folder, FEWER[name])
    teacher = family.load_network()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = family.student_network(teacher, guidance_embedding=False, smaller=True)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_smaller_student_takes_guidance_and_a_second_time(case):
    name, folder = case
    family = CHOSEN[name].make(folder, FEWER[name])
    told = family.capabilities.guidance_embedding
    student = family.student_network(family.load_network(), guidance_embedding=told, second_time=True, smaller=True)
    x_t, time, cond = inputs(family)
    guidance = torch.tensor([2.0, 4.0]) if told else None
    output = family.predict(student, x_t, time, cond, guidance=guidance, second_time=time / 2)
    output.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    assert output.shape == x_t.shape


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sdxl", {"student_layers_per_block": 3}, "family_config.student_layers_per_block = 3: the teacher has 2"),
        ("sdxl", {"student_layers_per_block": [1, 1, 1]}, "the network has 2 levels"),
        ("sdxl", {"student_transformer_layers": [1, 1]}, "student_transformer_layers = 1: the teacher has 0"),
        ("sdxl", {"student_transformer_layers": 0}, "0 at the coarsest level, whose depth the middle block shares"),
        ("sd3.5-without-t5", {"student_num_layers": 9}, "family_config.student_num_layers = 9: the teacher has 3"),
        ("flux", {"student_num_single_layers": 9}, "student_num_single_layers = 9: the teacher has 2"),
    ],
)
def test_more_blocks_than_the_teacher_has_are_refused(tmp_path, name, settings, message):
    family = CHOSEN[name].make(CHOSEN[name].write(tmp_path / "model"), settings)
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        family.student_network(family.load_network(), guidance_embedding=False, smaller=True)
    assert refused.value.remedy


def test_a_lora_cannot_be_smaller(tmp_path):
    file = write_run(tmp_path, family_config={"student_mid_block": False})
    result = distill("config", "check", "--config", str(file), "--data", str(tmp_path / "multidatabackend.json"))
    assert result.exit_code == 2
    text = said(result.stderr)
    assert f"{file}: family_config.student_mid_block = False" in text
    assert "makes the student smaller than its teacher" in text
    assert "set model_type to full" in text


@pytest.mark.parametrize("settings", [{"student_layers_per_block": 5}])
def test_a_run_that_asks_for_too_much_ends_with_the_key(tmp_path, settings):
    file = write_run(tmp_path, model_type="full", family_config=settings)
    result = distill("run", "--config", str(file), "--data", str(tmp_path / "multidatabackend.json"))
    assert result.exit_code == 2
    assert "family_config.student_layers_per_block = 5: the teacher has 2" in said(result.stderr)


def test_a_run_trains_resumes_and_exports_a_smaller_student(tmp_path):
    from diffusers import StableDiffusionXLPipeline

    settings = {"model_type": "full", "family_config": FEWER["sdxl"], "max_train_steps": 6}
    whole, _ = execute(write_run(tmp_path, output="whole", **settings))
    execute(write_run(tmp_path, output="parts", **settings), max_train_steps=3)
    execute(write_run(tmp_path, output="parts", **settings))
    assert losses(tmp_path / "whole")[-1] == losses(tmp_path / "parts")[-1]
    student = tmp_path / "whole" / "student"
    config = json.loads((student / "unet" / "config.json").read_text())
    assert (config["layers_per_block"], config["mid_block_type"]) == ([1, 1], None)
    pipeline = StableDiffusionXLPipeline.from_pretrained(student, add_watermarker=False)
    assert size(pipeline.unet) < size(CHOSEN["sdxl"].make(tmp_path / "model").load_network())
    images = pipeline(
        "a noise", width=32, height=32, num_inference_steps=1, guidance_scale=3.0, output_type="pt"
    ).images
    assert images.isfinite().all()
