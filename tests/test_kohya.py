"""LoRAs in kohya's format: the file alone, in plain diffusers, makes the student's images."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.engine.lora_layers import without_weights
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExportInfo, LoraSettings, ModelSettings
from distill.core.plugin_api.publisher import PublishSetting
from distill.model_families.comfyui import kohya
from distill.model_families.comfyui.kohya_flux import NAMES
from distill.model_families.comfyui.kohya_kolors import KOHYA as KOLORS
from distill.model_families.flux import Flux
from distill.model_families.sd3 import SD3
from distill.model_families.sdxl import SDXL
from distill.plugins.kohya import Kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.original_sdxl import unet_key
from support.tiny_families import MODELS, NEWER, Tiny
from support.tiny_sdxl import EDGE, write_tiny_sdxl

RANK, ALPHA = 4, 12.0
SAMPLER = Sampler("EulerDiscreteScheduler", {}, 2, 0.0)
FLOW = Sampler("FlowMatchEulerDiscreteScheduler", {}, 2, 0.0)
WEIGHTS = "pytorch_lora_weights.safetensors"
DOUBLE = tuple(f"transformer_blocks.{n}.{part}" for n in range(2) for part in
               ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
                "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
                "ff_context.net.2", "norm1.linear", "norm1_context.linear"))  # fmt: skip
"""Where a tiny FLUX can be adapted: diffusers reads the fused layer of its other blocks at the real width only."""


def write_student(family, folder, *, targets=None, sampler=SAMPLER, metadata=None):
    """A student whose LoRA, on everything that the family adapts, is random; alpha is three times the rank."""
    from peft import LoraConfig

    network = family.load_network()
    targets = list(targets or family.lora_targets)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, exclude_modules=without_weights(network, targets) or None
    )
    network.add_adapter(config, adapter_name="student")
    generator = torch.Generator().manual_seed(0)
    for key, parameter in network.named_parameters():
        if ".student." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    info = ExportInfo(sampler, "lora", LoraSettings(RANK, ALPHA), metadata=metadata or {"distillation_method": "lcm"})
    family.export(network, folder, info)
    return folder


def publish(family, student, **config):
    setting = PublishSetting("fox", "lora", type(family), lambda: family)
    publisher = Kohya(Kohya.Config(**config), setting)
    assert publisher.problems() == []
    return publisher.publish(student)


def images(folder, lora=None, *, seed=3, edge=EDGE, **call):
    """What plain diffusers makes of the model in `folder`, with a LoRA (file or folder) loaded the documented way."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    settings = {"num_inference_steps": 2, "guidance_scale": 0.0, "width": edge, "height": edge, **call}
    generator = torch.Generator().manual_seed(seed)
    return pipeline("a red fox", generator=generator, output_type="pt", **settings).images


TINY_SDXL = Tiny("sdxl", write_tiny_sdxl)


@pytest.mark.parametrize(
    ("name", "base"), [("sdxl", "sdxl_base_v1-0"), ("sd1x", "sd_v1"), ("sd2x-v", "sd_v2_v"), ("flux-dev", "flux1")]
)
def test_the_file_makes_the_students_image_in_plain_diffusers(name, base, tmp_path):
    """On linear layers and convolutions alike, with an alpha that is not the rank."""
    tiny = {"sdxl": TINY_SDXL, **MODELS}[name]
    model, flow = tiny.write(tmp_path / "model"), name == "flux-dev"
    family = tiny.make(model)
    student = write_student(
        family, tmp_path / "out" / "student", targets=DOUBLE if flow else None, sampler=FLOW if flow else SAMPLER
    )
    place = publish(family, student)
    file = tmp_path / "out" / "fox-kohya.safetensors"
    assert place == str(file)
    call = tiny.unguided if flow else {}
    expected, ours, without = (images(model, lora, **call) for lora in (student, file, None))
    assert (expected - without).abs().max() > 0.01, "the LoRA does something"
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    with safe_open(file, framework="pt") as opened:
        about, names = opened.metadata(), set(opened.keys())
    assert about["ss_base_model_version"] == base
    assert (about["ss_network_dim"], about["ss_network_alpha"], about["ss_output_name"]) == ("4", "4", "fox-kohya")
    assert about["distillation_method"] == "lcm"
    assert about["ss_v2"] == str(name == "sd2x-v")
    assert ("ss_network_args" in about) == (not flow)
    stems = {entry.rpartition(".alpha")[0] for entry in names if entry.endswith(".alpha")}
    assert names == {f"{stem}.{part}" for stem in stems for part in ("alpha", "lora_down.weight", "lora_up.weight")}
    assert all(stem.startswith("lora_unet_") and "." not in stem for stem in stems)
    assert not list(file.parent.glob(".*")), "nothing is left beside it"


def test_the_miniatures_student_is_the_same_in_both_formats(tmp_path):
    """The trained miniature, whose layout is not the real one's: one layer per level, three levels."""
    family = SDXL(SDXL.Config(), ModelSettings(source=str(SDXL.miniature)))
    student = write_student(family, tmp_path / "student")
    publish(family, student)
    expected, ours, without = (
        images(SDXL.miniature, lora, edge=64) for lora in (student, tmp_path / "fox-kohya.safetensors", None)
    )
    assert (expected - without).abs().max() > 0.05
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_sdxls_modules_have_the_names_of_the_original_code():
    """Of every convolution and linear layer of SDXL's own layout, against the names that single files have."""
    from diffusers import UNet2DConditionModel
    from support.tiny_sdxl import unet_config

    config = {
        **unet_config(),
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 2, 2),
    }
    unet = UNet2DConditionModel(**config)
    paths = [path for path, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    for path in paths:
        assert f"{kohya.original_unet_path(path, unet.config)}.weight" == unet_key(f"{path}.weight", 2, 3)
    assert kohya.original_unet_path("up_blocks.0.upsamplers.0.conv", unet.config) == "output_blocks.2.2.conv"
    assert kohya.original_unet_path("down_blocks.1.attentions.0.proj_in", unet.config) == "input_blocks.4.1.proj_in"
    with pytest.raises(UserError, match=r"other\.thing has no name"):
        kohya.original_unet_path("other.thing", unet.config)


def test_every_layer_of_a_real_sized_flux_comes_back_from_diffusers_reader(tmp_path):
    """Tensors of the real widths (the LoRA alone): fused layers are taken apart into the ones that were trained."""
    from diffusers import FluxPipeline

    width, alpha = 3072, 6.0
    outs = {"norm1.linear": 6 * width, "norm1_context.linear": 6 * width, ".norm.linear": 3 * width}
    outs |= {"to_q": width, "proj_mlp": 4 * width, "ff.net.0.proj": 4 * width, "ff_context.net.0.proj": 4 * width}
    single = [f"single_transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp",
                                                                 "proj_out", "norm.linear")]  # fmt: skip
    paths = [*(path for path in DOUBLE if path.startswith("transformer_blocks.0.")), *single]
    g = torch.Generator().manual_seed(0)
    layers = {}
    for path in paths:
        size = next((out for end, out in outs.items() if path.endswith(end)), width)
        inner = {"transformer_blocks.0.ff.net.2": 4 * width, "single_transformer_blocks.0.proj_out": 5 * width}
        down, up = torch.randn(2, inner.get(path, width), generator=g), torch.randn(size, 2, generator=g)
        layers[path] = kohya.Layer(down, up, alpha)
    state = kohya.tensors(NAMES.renamed(layers, {}), torch.float32)
    assert state["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (8, width)
    assert state["lora_unet_single_blocks_0_linear1.alpha"] == 4 * alpha
    save_file(state, tmp_path / "real.safetensors")
    read = FluxPipeline.lora_state_dict(str(tmp_path / "real.safetensors"))
    assert {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in read} == set(paths)
    for path, layer in layers.items():
        change = layer.alpha / layer.rank * layer.up[:16] @ layer.down
        up, down = (read[f"transformer.{path}.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(up[:16] @ down, change)


def test_an_sd3_file_is_for_comfyui_and_comes_back_whole(tmp_path):
    """All that the family adapts, of which one modulation has its halves the other way round in the original code."""
    tiny = MODELS["sd3"]
    model = tiny.write(tmp_path / "model")
    family = tiny.make(model)
    student = write_student(family, tmp_path / "out" / "student", sampler=FLOW)
    place = publish(family, student)
    file = tmp_path / "out" / "fox-kohya.safetensors"
    assert place == f"{file} (for ComfyUI and sd-scripts; in diffusers use student/, as its README.md says)"
    with safe_open(file, framework="pt") as opened:
        about, names = opened.metadata(), set(opened.keys())
    assert (about["ss_base_model_version"], about["ss_network_module"]) == ("sd3", "networks.lora_sd3")
    last = family.denoiser_config["num_layers"] - 1
    assert f"lora_unet_joint_blocks_{last}_context_block_adaLN_modulation_1.lora_up.weight" in names
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha" in names
    without = family.load_network().state_dict()
    fused, ours = (tiny.make(model, teacher_lora=((str(lora), 1.0),)).load_network().state_dict()
                   for lora in (student, file))  # fmt: skip
    changed = [name for name, weight in fused.items() if not torch.equal(weight, without[name])]
    assert len(changed) == sum(name.endswith(".lora_A.weight") for name in load_file(student / WEIGHTS))
    for name in fused:
        torch.testing.assert_close(ours[name], fused[name], rtol=0, atol=1e-6)
    beside, ours = (family.loras.plain(str(lora), 1.0).state for lora in (student, file))
    for name in [name for name in beside if name.endswith(".lora_A.weight")]:
        up = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(ours[up] @ ours[name], beside[up] @ beside[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "z-image" else pytest.mark.slow) for name in NEWER]
)
def test_a_newer_familys_file_is_read_back_as_its_students_own(name, tmp_path):
    """Fused into the teacher (`teacher_lora`) both change the same weights by the same."""
    tiny = NEWER[name]
    model = tiny.write(tmp_path / "model")
    family = tiny.make(model)
    if family.architecture.kohya is None:
        setting = PublishSetting("fox", "lora", type(family), lambda: family)
        assert Kohya(Kohya.Config(), setting).problems()
        return
    sampler = FLOW if family.prediction_type == "flow" else SAMPLER
    student = write_student(family, tmp_path / "out" / "student", sampler=sampler)
    publish(family, student)
    own, ours = (
        tiny.make(model, teacher_lora=((str(lora), 1.0),)).load_network().state_dict()
        for lora in (student, tmp_path / "out" / "fox-kohya.safetensors")
    )
    without = family.load_network().state_dict()
    changed = [key for key, value in own.items() if not torch.equal(value, without[key])]
    adapted = sum(key.endswith(".lora_A.weight") for key in load_file(student / WEIGHTS))
    assert len(changed) == adapted
    for key, value in own.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)


def test_kolors_file_comes_back_from_diffusers_reader(tmp_path):
    """From that of the first generation's pipeline, which Kolors' has as well."""
    tiny = NEWER["kolors"]
    network = tiny.make(tiny.write(tmp_path / "model")).load_network()
    paths = [path for path, module in network.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    layers = {path: kohya.Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0) for path in paths if "attentions" in path}
    file = tmp_path / "kolors.safetensors"
    kohya.write_file(file, kohya.tensors(KOLORS.renamed(layers, network.config), torch.float32), {})
    architecture = replace(SDXL.architecture, pipeline="StableDiffusionPipeline")
    assert kohya.readable(file, architecture, network.config) == layers.keys()


def test_a_flux_whose_last_layer_is_adapted_says_what_diffusers_leaves_out(tmp_path):
    tiny = MODELS["flux-schnell"]
    family = tiny.make(tiny.write(tmp_path / "model"))
    student = write_student(family, tmp_path / "student", targets=("proj_out_of_nothing", *DOUBLE[:4]), sampler=FLOW)
    state = load_file(student / WEIGHTS)
    with safe_open(student / WEIGHTS, framework="pt") as opened:
        about = opened.metadata()
    state |= {f"transformer.proj_out.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    adapter = {**json.loads(about["lora_adapter_metadata"]), "transformer.lora_alpha": ALPHA}
    about["lora_adapter_metadata"] = json.dumps(adapter)  # as a file whose scale is not in its weights
    save_file(state, student / WEIGHTS, metadata=about)
    assert "ComfyUI reads proj_out in it, diffusers leaves it out" in publish(family, student)
    written = load_file(tmp_path / "fox-kohya.safetensors")
    assert written["lora_unet_final_layer_linear.alpha"] == RANK, "its scale is in its weights"
    assert {value.item() / RANK for name, value in written.items() if name.endswith(".alpha")} == {1.0, 3.0}, "fused: 3"
    assert torch.equal(written["lora_unet_final_layer_linear.lora_up.weight"], torch.full((4, 4), ALPHA / RANK))


def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    tiny = MODELS["flux-dev"]
    family = tiny.make(tiny.write(tmp_path / "model"))
    cases = {
        "one layer, and transformer_blocks.0.attn.to_k is not adapted": ("transformer_blocks.0.attn.to_q",),
        "x_embedder has no name": ("x_embedder",),
        "diffusers cannot read the file": family.lora_targets,  # the reader knows one width of the fused layers
    }
    for number, (reason, targets) in enumerate(cases.items()):
        student = write_student(family, tmp_path / str(number) / "student", targets=targets, sampler=FLOW)
        with pytest.raises(UserError, match=reason) as caught:
            publish(family, student)
        assert WEIGHTS in caught.value.remedy
        assert [path.name for path in student.parent.iterdir()] == ["student"]
    (tmp_path / "full").mkdir()
    with pytest.raises(UserError, match="holds no LoRA"):
        publish(family, tmp_path / "full")
    (student / "second_time.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="second time"):
        publish(family, student)
    other = tmp_path / "other.txt"
    other.write_text("x")
    assert "does not end in .safetensors" in Kohya(Kohya.Config(file=other)).problems()[0]


def test_students_without_such_a_file_are_refused_at_the_start_of_a_run():
    full = Kohya(Kohya.Config(), PublishSetting("fox", "full", SDXL))
    assert "fully trained" in full.problems()[0]

    class Unknown(SD3):
        architecture = replace(SD3.architecture, title="a Stable Diffusion 9", kohya=None)

    (problem,) = Kohya(Kohya.Config(), PublishSetting("fox", "lora", Unknown)).problems()
    assert problem == "a Stable Diffusion 9 has no form in kohya's format that ComfyUI reads"
    for family in (Flux, SD3):
        assert Kohya(Kohya.Config(), PublishSetting("fox", "lora", family)).problems() == []


def test_half_precision_is_the_rounded_file(tmp_path):
    family = TINY_SDXL.make(write_tiny_sdxl(tmp_path / "model"))
    student = write_student(family, tmp_path / "student")
    files = [tmp_path / name for name in ("whole.safetensors", "half.safetensors")]
    publish(family, student, file=files[0])
    publish(family, student, file=files[1], dtype="bfloat16")
    whole, half = (load_file(file) for file in files)
    kept = {name for name in half if name.endswith(".alpha")}  # bfloat16 would make 300 of 301
    assert all(torch.equal(value, whole[name]) for name, value in half.items() if name in kept)
    assert all(torch.equal(value, whole[name].bfloat16()) for name, value in half.items() if name not in kept)
    with safe_open(files[0], framework="pt") as opened:
        assert json.loads(opened.metadata()["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4"}
