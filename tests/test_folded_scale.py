"""A LoRA whose alpha is not its rank is exported with its scale in the weights, for readers that know no alpha."""

from __future__ import annotations

import json

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.engine.networks import Networks
from distill.core.plugin_api.family import ExportInfo, LoraSettings
from distill.core.plugin_api.method import Role
from safetensors import safe_open
from safetensors.torch import load_file
from support.config_files import distill
from support.sdxl_setup import make_batch, make_setup
from support.small_run import write_run
from support.tiny_sdxl import write_tiny_sdxl

WEIGHTS = "pytorch_lora_weights.safetensors"
ROLES = [Role("teacher"), Role("student", trains="lora")]
INFO = ExportInfo(Sampler("LCMScheduler", {}, 2, 0.0), "lora", metadata={"distillation_method": "lcm"})
ODD, HALF = LoraSettings(24, 7.0), LoraSettings(16, 2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


def trained(model, lora, *, dtype=torch.float32):
    """A family, its networks with a student that does something, and the student's weights."""
    family, *_ = make_setup(model, dtype=torch.float32)
    networks = Networks(family, ROLES, lora=lora, seed=0, parameter_dtype=dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in networks.parameters("student"):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=g))
    return family, networks


def exported(family, networks, folder):
    with networks.use("student") as network:
        family.export(network, folder, INFO)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        about = file.metadata()
    # copies: weights of a mapped file lie unaligned, for which kernels round otherwise
    return {name: weight.clone() for name, weight in load_file(folder / WEIGHTS).items()}, about


def output(family, network, *, batch=None):
    batch = batch or make_batch(family, dtype=torch.float32)
    with torch.no_grad():
        return family.predict(network, batch.latents, torch.tensor([999, 499, 19, 0]), batch.cond)


@pytest.mark.parametrize("lora", [ODD, HALF], ids=["24 and 7", "16 and 2"])
def test_a_reader_that_knows_no_alpha_has_the_trained_network(model, tmp_path, lora):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    family, networks = trained(model, lora)
    state, about = exported(family, networks, tmp_path)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    plain = LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=list(family.lora_targets))
    inject_adapter_in_model(plain, unet)
    layers = {name.removeprefix("unet."): weight for name, weight in state.items()}
    assert not set_peft_model_state_dict(unet, layers).unexpected_keys
    with networks.use("student") as network:
        expected = output(family, network)
    with networks.use("teacher") as network:
        assert (output(family, network) - expected).abs().max() > 0.1, "the adapter does something"
    torch.testing.assert_close(output(family, unet), expected, rtol=1e-5, atol=1e-6)
    settings = json.loads(about["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (lora.rank, lora.rank)
    assert float(about["lora_scale_in_weights"]) == pytest.approx(lora.alpha / lora.rank, rel=1e-11)
    assert about["distillation_method"] == "lcm"


@pytest.mark.parametrize("lora", [ODD, HALF], ids=["24 and 7", "16 and 2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_change_of_each_weight_is_alpha_over_rank_times_the_product(model, tmp_path, lora, dtype):
    """Also where half precision was trained: the factors are then written in float32, or scaled exactly."""
    family, networks = trained(model, lora, dtype=dtype)
    state, _ = exported(family, networks, tmp_path)
    own = {name.replace(".student.", "."): weight for name, weight in networks.named_parameters("student").items()}
    assert {f"unet.{name}" for name in own} == set(state)
    expected_dtype = dtype if lora is HALF else torch.float32
    for name in [name for name in own if ".lora_A." in name]:
        second = name.replace(".lora_A.", ".lora_B.")
        ours, theirs = state[f"unet.{second}"], own[second].double() * (lora.alpha / lora.rank)
        assert ours.dtype == state[f"unet.{name}"].dtype == expected_dtype
        assert torch.equal(state[f"unet.{name}"].double(), own[name].double())
        torch.testing.assert_close(ours.double(), theirs, rtol=0 if lora is HALF else 6e-8, atol=0)


def test_the_file_comes_back_as_the_student_it_was(model, tmp_path):
    """Bit for bit where the scale is a power of two: generating from it, and starting another run from it."""
    family, networks = trained(model, HALF)
    exported(family, networks, tmp_path)
    with networks.use("student") as network:
        expected = output(family, network)
    assert torch.equal(output(family, family.load_student(tmp_path)), expected)
    again = Networks(family, ROLES, lora=HALF, seed=5)
    again.start_from("student", str(tmp_path))
    for name, weight in networks.named_parameters("student").items():
        assert torch.equal(again.named_parameters("student")[name], weight), name
    other = Networks(family, ROLES, lora=LoraSettings(16, 5.0), seed=5)
    other.start_from("student", str(tmp_path))
    with other.use("student") as network:
        torch.testing.assert_close(output(family, network), expected, rtol=1e-5, atol=1e-5)


def test_an_alpha_that_is_the_rank_changes_no_weight(model, tmp_path):
    family, networks = trained(model, LoraSettings(4, 4.0))
    state, about = exported(family, networks, tmp_path)
    own = networks.named_parameters("student")
    assert all(torch.equal(state[f"unet.{name.replace('.student.', '.')}"], weight) for name, weight in own.items())
    assert "lora_scale_in_weights" not in about


def test_a_run_says_where_its_scale_is(tmp_path):
    config = write_run(
        tmp_path, lora_alpha=0.5, publish_to="kohya", max_train_steps=2, report_to="none", validation_step_interval=0,
        checkpoint_step_interval=0,
    )  # fmt: skip
    result = distill("run", "--config", config)
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert "trained with alpha 0.5 at rank 4: this scale of 0.125 is in its weights" in card
    kohya = load_file(tmp_path / "out" / "out-kohya.safetensors")
    assert {value.item() for name, value in kohya.items() if name.endswith(".alpha")} == {4.0}
    student = load_file(tmp_path / "out" / "student" / WEIGHTS)
    assert sorted(value.abs().sum().item() for name, value in student.items() if "lora_B" in name) == sorted(
        value.abs().sum().item() for name, value in kohya.items() if name.endswith("lora_up.weight")
    )
