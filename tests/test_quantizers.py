"""Every quantizer: what it computes, what it saves, and a LoRA that is trained, resumed and exported on top of it."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.engine.networks import Networks
from distill.core.errors import ConfigError
from distill.core.plugin_api.family import ExportInfo, LoraSettings, ModelSettings
from distill.core.plugin_api.method import MethodSetup
from distill.core.plugin_api.precision import BASE, Precisions
from distill.core.plugin_api.quantizer import stored_bytes
from distill.core.registry.registry import Registry
from distill.core.runs.planned_memory import planned_memory
from distill.core.utils.memory import savings
from distill.distill_methods.lcm import LCM
from distill.model_families.sdxl import SDXL
from safetensors.torch import load_file
from support.small_run import execute, losses, write_run
from support.tiny_families import write_tiny_sd3
from support.tiny_sdxl import write_tiny_sdxl
from torch import nn

REGISTRY = Registry.load(installed=False)
NAMES = REGISTRY.names("quantizer")
OPTIONS = {"int4-torchao": {"group_size": 16}}
"""Layers of tiny models have few inputs."""
ERRORS = {"int8-torchao": 0.02, "int8-quanto": 0.02, "fp8-torchao": 0.06, "int4-torchao": 0.2, "nf4-bnb": 0.2}
"""Relative error of outputs and gradients, about twice of what rounding to so many bits gives."""
each = pytest.mark.parametrize("name", NAMES)


def make(name):
    quantizer = REGISTRY.get("quantizer", name)
    return quantizer(quantizer.Config(**OPTIONS.get(name, {})))


class Small(nn.Module):
    """Linear layers and a convolution, one of them to be left alone."""

    def __init__(self, dtype):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.wide, self.narrow = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
            self.kept, self.conv = nn.Linear(64, 64), nn.Conv2d(4, 4, 3, padding=1)
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        hidden = self.narrow(nn.functional.silu(self.wide(self.kept(x))))
        return self.conv(hidden.reshape(-1, 4, 4, 4)).flatten(1)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_the_names_that_users_know_are_there():
    assert set(NAMES) == {"int8-torchao", "int4-torchao", "fp8-torchao", "int8-quanto", "nf4-bnb"}
    assert set(ERRORS) == set(NAMES)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_quantised_network_computes_nearly_the_same_in_fewer_bytes(name, dtype):
    network, quantizer = Small(dtype), make(name)
    plain, modules = copy.deepcopy(network), list(dict(network.named_modules()))
    small = quantizer.quantize(network, device="cpu", keep=("kept",))
    assert list(dict(small.named_modules())) == modules
    assert torch.equal(small.kept.weight, plain.kept.weight)
    linear = [getattr(plain, part).weight for part in ("wide", "narrow")]
    saved = sum(weight.numel() * (weight.element_size() - quantizer.bytes_per_weight) for weight in linear)
    assert stored_bytes(plain) - quantizer.stored_bytes(small) == pytest.approx(saved, rel=0.12)

    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = small(found)
    assert y.dtype == dtype
    assert 0 < relative(y, plain(expected)) < ERRORS[name]
    assert torch.equal(y, small(found)), "two calls give the same bits"
    y.float().square().sum().backward()
    plain(expected).float().square().sum().backward()
    assert relative(found.grad, expected.grad) < 2 * ERRORS[name]
    assert not any(parameter.requires_grad for parameter in small.parameters())
    with torch.no_grad():
        assert torch.equal(small(x), y), "a pass without a gradient is the same"
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            assert small.wide(x.float()).dtype == plain.wide(x.float()).dtype == dtype


@each
def test_a_declared_forward_mode_derivative_is_right(name):
    network, quantizer = Small(torch.float32), make(name)
    small = quantizer.quantize(network, device="cpu")
    if not quantizer.forward_ad:
        return
    x, v = (torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = small(torch.autograd.forward_ad.make_dual(x, v))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    difference = (small(x + 0.01 * v) - small(x - 0.01 * v)) / 0.02
    assert relative(tangent, difference) < 1e-3


# -- a student on top -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


def family_on(folder, name, dtype="float32"):
    precision = Precisions({BASE: make(name)} if name else {})
    return SDXL(SDXL.Config(), ModelSettings(str(folder), weight_dtype=dtype, precision=precision))


def student_on(family):
    """Networks of an LCM whose adapter does something."""
    method = LCM(LCM.Config(), MethodSetup("lora"))
    networks = Networks(family, method.roles(method.config, method.setup), lora=LoraSettings(4, 8.0), seed=0)
    rng = torch.Generator().manual_seed(5)
    for key, parameter in networks.named_parameters("student").items():
        if "lora_B" in key:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return method, networks


def image(family, network, method):
    embeds = family.encode_prompts(["a red thing"])
    sampler = method.sampler(family.schedule, num_inference_steps=2)
    return family.generate(network, embeds, sampler=sampler, seeds=[3], width=32, height=32)


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_exported_student_is_the_trained_one_on_the_same_base(name, dtype, sdxl, tmp_path, said):
    family = family_on(sdxl, name, dtype)
    method, networks = student_on(family)
    assert len(said) == 1
    assert f"quantised by {name}" in said[0]
    with networks.use("student") as network:
        trained = image(family, network, method)
        info = ExportInfo(method.sampler(family.schedule), "lora", LoraSettings(4, 8.0))
        family.export(network, tmp_path / "student", info)
    with networks.use("teacher") as network:
        teacher = image(family, network, method)
    bare = family_on(sdxl, name, dtype)
    assert torch.equal(teacher, image(bare, bare.load_network(), method)), "adapters off: the quantised base"
    again = family_on(sdxl, name, dtype)
    assert torch.equal(image(again, again.load_student(tmp_path / "student"), method), trained)
    assert not torch.equal(teacher, trained)

    plain = family_on(sdxl, None, dtype)
    unquantised = image(plain, plain.load_student(tmp_path / "student"), method)
    assert 0 < (unquantised - trained).abs().mean() < 0.05


@each
def test_no_lora_can_be_merged_into_a_quantised_base_in_silence(name, sdxl):
    from peft.tuners.tuners_utils import BaseTunerLayer

    family = family_on(sdxl, name)
    _, networks = student_on(family)
    with networks.use("student") as network:
        layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer) and m.in_features == 64]
        packed = [layer for layer in layers if not layer.get_base_layer().weight.is_floating_point()]
        assert packed
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            packed[0].merge()


@each
def test_a_run_trains_resumes_and_keeps_the_base_out_of_its_checkpoints(name, tmp_path):
    settings = {
        "base_model_precision": name,
        "text_encoder_1_precision": name,
        "quantizer_config": {name: OPTIONS.get(name, {})},
        "mixed_precision": "bf16",
        "max_train_steps": 4,
        "checkpoint_step_interval": 2,
        "validation_step_interval": 0,
        "report_to": "none",
    }
    write_tiny_sdxl(tmp_path / "model", layers_per_block=1)
    _, lines = execute(write_run(tmp_path, output="whole", **settings))
    assert [line.split()[0] for line in lines if " quantised by " in line] == ["text_encoder_1", "base_model"]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for later in ("student", "checkpoint-4"):
        shutil.rmtree(tmp_path / "parts" / later)
    _, lines = execute(write_run(tmp_path, output="parts", **settings))
    assert any("resumed" in line and "step 2" in line for line in lines)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    stored = [key for file in (tmp_path / "whole" / "checkpoint-4").glob("*.safetensors") for key in load_file(file)]
    assert any("lora_A" in key for key in stored)
    assert not any("base_layer" in key for key in stored)
    resolved = json.loads((tmp_path / "whole" / "config.resolved.json").read_text())
    assert list(resolved["quantizer_config"]) == [name]


def test_text_encoders_and_base_have_fingerprints_of_their_own(sdxl):
    plain, base = family_on(sdxl, None), family_on(sdxl, "int8-torchao")
    text = SDXL(
        SDXL.Config(),
        replace(plain.settings, precision=Precisions({"text_encoder_2": make("int8-torchao")})),
    )
    assert base.fingerprint("denoiser") != plain.fingerprint("denoiser")
    assert base.fingerprint("text") == plain.fingerprint("text")
    assert text.fingerprint("text") != plain.fingerprint("text")
    assert text.fingerprint("denoiser") == plain.fingerprint("denoiser")


def test_the_weight_type_that_other_layers_read_is_unchanged(tmp_path):
    """T5 casts to the type of one of its weights; packed numbers would make whole numbers of its states."""
    from distill.model_families.sd3 import SD3

    folder = write_tiny_sd3(tmp_path / "sd3")
    plain = SD3(SD3.Config(), ModelSettings(str(folder)))
    parts = {BASE: make("nf4-bnb"), **{f"text_encoder_{number}": make("nf4-bnb") for number in (1, 2, 3)}}
    small = SD3(SD3.Config(), ModelSettings(str(folder), precision=Precisions(parts)))
    expected, found = (family.encode_prompts(["a red thing"]) for family in (plain, small))
    for key, value in expected.items():
        assert 0 < relative(found[key].float(), value.float()) < 0.6, key
    network = small.load_network()
    assert small.input_weight(network).is_floating_point()


def test_a_network_without_quantisable_layers_is_refused(sdxl):
    quantizer = REGISTRY.get("quantizer", "int4-torchao")
    precision = Precisions({BASE: quantizer(quantizer.Config(group_size=256))})
    family = SDXL(SDXL.Config(), ModelSettings(str(sdxl), precision=precision))
    with pytest.raises(Exception, match="saves nothing"):
        family.load_network()


def test_doctor_expects_what_the_run_then_holds(tmp_path):
    found = {}
    for name in ("no_change", "int8-torchao"):
        config = write_run(tmp_path, output=name, base_model_precision=name)
        configuration = load_configuration(REGISTRY, config_file=config)
        settings = planned_memory(configuration, REGISTRY)
        found[name] = settings.base_parameters * settings.base_bytes
    family = family_on(tmp_path / "model", "int8-torchao")
    family.load_network()
    before, after = family.settings.precision.stored(BASE)
    assert found["no_change"] == before
    assert found["int8-torchao"] == pytest.approx(after, rel=0.05)


# -- the teacher beside a full student -----------------------------------------------------------------------------


def full_student_on(family):
    """Networks of an LCM whose student and average have weights of their own."""
    method = LCM(LCM.Config(w_min=3.0, w_max=3.0), MethodSetup("full"))
    return Networks(family, method.roles(method.config, method.setup), lora=None, seed=0)


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_student_begins_with_the_unquantised_weights_beside_a_quantised_teacher(name, dtype, sdxl):
    plain, packed = (full_student_on(family_on(sdxl, chosen, dtype)) for chosen in (None, name))
    for role in ("student", "target"):
        ours, theirs = packed.named_parameters(role), plain.named_parameters(role)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), role
    assert make(name).stored_bytes(packed.base) < 0.9 * stored_bytes(plain.base)
    assert packed.module("teacher") is packed.base
    assert not packed.named_parameters("teacher")


def test_the_new_weights_of_a_transformers_student_do_not_come_from_a_packed_teacher(tmp_path):
    from distill.model_families.flux import Flux
    from support.tiny_families import write_tiny_flux

    folder, students = write_tiny_flux(tmp_path / "flux", guidance=False), []
    for name in (None, "nf4-bnb"):
        precision = Precisions({BASE: make(name)} if name else {})
        family = Flux(Flux.Config(), ModelSettings(str(folder), precision=precision))
        teacher = family.load_network()
        students.append(family.student_network(teacher, guidance_embedding=not family.takes_guidance(teacher)))
    ours, theirs = (student.state_dict() for student in students)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == torch.float32 for key in theirs)


def test_a_run_of_a_full_student_beside_a_quantised_teacher_trains_and_resumes(tmp_path):
    settings = {
        "model_type": "full", "teacher_precision": "int8-torchao", "mixed_precision": "no", "max_train_steps": 4,
        "checkpoint_step_interval": 2, "validation_step_interval": 0, "report_to": "none", "learning_rate": 1e-4,
        "distillation_config": {"lcm": {"w_min": 3.0, "w_max": 3.0, "loss_type": "l2"}},
    }  # fmt: skip
    whole, lines = execute(write_run(tmp_path, output="whole", **settings))
    assert [line.split(":")[0] for line in lines if " quantised by " in line] == ["teacher quantised by int8-torchao"]
    execute(write_run(tmp_path, output="parts", **settings), max_train_steps=2)
    execute(write_run(tmp_path, output="parts", **settings))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    execute(write_run(tmp_path, output="plain", **{**settings, "teacher_precision": "no_change"}))
    for (_, ours, _), (_, plain, _) in zip(losses(tmp_path / "whole"), losses(tmp_path / "plain"), strict=True):
        assert 0 < abs(ours - plain) < 0.05 * plain, "the teacher alone is rounded"
    assert (whole.student / "unet").is_dir()

    found = {}
    for output in ("whole", "plain"):
        configuration = load_configuration(REGISTRY, config_file=tmp_path / f"{output}.json")
        planned = planned_memory(configuration, REGISTRY)
        found[output] = planned.base_parameters * planned.base_bytes
    assert "teacher_precision=int8-quanto" in dict(savings(planned, quantizers=True))
    family = family_on(tmp_path / "model", "int8-torchao")
    family.load_network()
    before, after = family.settings.precision.stored(BASE)
    assert found["plain"] == before
    assert found["whole"] == pytest.approx(after, rel=0.05), "doctor counts the packed teacher"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher_precision": "int8-torchao"},
            "(?s)teacher_precision = 'int8-torchao': the teacher of a LoRA is the LoRA's own base .*"
            "set base_model_precision to it instead",
        ),
        (
            {"base_model_precision": "int8-torchao", "model_type": "full"},
            "(?s)this one is what model_type full trains.*teacher_precision quantises the teacher beside the student",
        ),
        (
            {"teacher_precision": "int8-torcha", "model_type": "full"},
            "(?s)teacher_precision = 'int8-torcha'.*did you mean 'int8-torchao'",
        ),
        (
            {
                "teacher_precision": "nf4-bnb", "model_type": "full", "distillation_method": "meanflow",
                "distillation_config": {"meanflow": {"derivative": "exact"}},
            },
            "(?s)teacher_precision = 'nf4-bnb': the method 'meanflow' differentiates the network in forward mode",
        ),
    ],
)  # fmt: skip
def test_a_precision_of_the_wrong_network_is_refused_with_the_right_key(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_configuration(REGISTRY, config_file=write_run(tmp_path, **settings))
