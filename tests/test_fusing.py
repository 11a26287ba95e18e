"""LoRAs are fused into the teacher layer by layer: as the whole network in fp32 would be, without its memory."""

from __future__ import annotations

import gc

import pytest
import torch
from distill.core.plugin_api.family import ModelSettings
from distill.model_families.files.source import Source
from distill.model_families.sdxl import SDXL
from safetensors.torch import load_file, save_file
from support.tiny_sdxl import write_tiny_sdxl
from torch._subclasses.fake_tensor import FakeTensor

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
LAST = "conv_out"


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    """A DoRA, a LoRA of linear layers and convolutions in half precision, and a full difference: (file, weight)."""
    folder, state = tmp_path_factory.mktemp("loras"), load_file(next((tiny / "unet").glob("*.safetensors")))
    out, into = state[f"{LINEAR}.weight"].shape
    dora = {"lora_A.weight": random(3, into), "lora_B.weight": random(out, 3), "lora_magnitude_vector": random(out) + 2}
    plain = {}
    for path in (LINEAR, CONV, LAST):
        out, into, *kernel = state[f"{path}.weight"].shape
        plain[f"unet.{path}.lora_A.weight"] = random(4, into, *kernel).half()
        plain[f"unet.{path}.lora_B.weight"] = random(out, 4, *[1] * len(kernel)).half()
    files = {
        "dora": ({f"unet.{LINEAR}.{leaf}": value for leaf, value in dora.items()}, 1.0),
        "plain": (plain, -0.3),
        "diff": ({f"unet.{LINEAR}.diff": random(*state[f"{LINEAR}.weight"].shape)}, 0.5),
    }
    for name, (tensors, _) in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return tuple((str(folder / f"{name}.safetensors"), weight) for name, (_, weight) in files.items())


def make(tiny, loras, dtype):
    return SDXL(SDXL.Config(), ModelSettings(str(tiny), teacher_lora=loras, weight_dtype=dtype))


def by_peft(tiny, loras):
    """The whole UNet in fp32 with the LoRAs fused one after the other by plain diffusers, and the difference added."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    for file, weight in loras[:2]:
        pipeline.load_lora_weights(file, adapter_name="one")
        pipeline.set_adapters(["one"], [weight])
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
    state = pipeline.unet.state_dict()
    file, weight = loras[2]
    state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"] + weight * load_file(file)[f"unet.{LINEAR}.diff"]
    return state


def test_every_type_of_the_teacher_is_the_fused_network_in_fp32_rounded_once(tiny, loras):
    expected = by_peft(tiny, loras)
    plain = make(tiny, (), "float32").load_network().state_dict()
    changed = {name for name, value in expected.items() if not torch.equal(value, plain[name])}
    assert changed == {f"{path}.weight" for path in (LINEAR, CONV, LAST)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        family = make(tiny, loras, str(dtype).removeprefix("torch."))
        network = family.load_network()
        for name, value in network.state_dict().items():
            assert torch.equal(value, expected[name].to(value.dtype)), name
        assert network.conv_out.weight.dtype == torch.float32
        student = family.student_network(network, guidance_embedding=False).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in student.items())


@pytest.fixture
def frozen_heap():
    """What is there before is left out of :func:`fp32_bytes`: after thousands of tests it takes a second to walk."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def fp32_bytes():
    """Bytes of the distinct float32 storages that are alive; stand-ins of compilers have none."""
    tensors = (each for each in gc.get_objects() if isinstance(each, torch.Tensor))
    alive = [each for each in tensors if each.device.type == "cpu" and not isinstance(each, FakeTensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in alive
                if each.dtype == torch.float32}  # fmt: skip
    return sum(storages.values())


def test_no_more_than_one_layer_is_held_in_fp32(tiny, loras, frozen_heap, monkeypatch, tmp_path):
    """Every layer of the network is changed; of 1.6 MB in fp32 a layer's worth is alive at a time."""
    state = load_file(next((tiny / "unet").glob("*.safetensors")))
    differences = {f"unet.{name.removesuffix('.weight')}.diff": torch.zeros(value.shape, dtype=torch.bfloat16)
                   for name, value in state.items() if name.endswith(".weight")}  # fmt: skip
    save_file(differences, tmp_path / "all.safetensors")
    whole = 4 * sum(value.numel() for value in state.values())
    largest = 4 * max(value.numel() for value in state.values())
    family = make(tiny, ((str(tmp_path / "all.safetensors"), 1.0),), "bfloat16")
    lora = sum(4 * value.numel() for value in differences.values())
    monkeypatch.setattr(type(family.loras), "teacher", lambda self, read=family.loras.teacher(): read)
    del state
    before, peaks, real = fp32_bytes(), [], Source.wide_weights

    def wide_weights(self, names=None):
        for number, pair in enumerate(real(self, names)):
            if number % 7 == 0:
                peaks.append(fp32_bytes() - before)
            yield pair

    monkeypatch.setattr(Source, "wide_weights", wide_weights)
    network = family.load_network()
    ends = sum(4 * weight.numel() for weight in network.parameters() if weight.dtype == torch.float32)
    assert len(peaks) > 10
    assert lora > 0.9 * whole
    assert 0 < max(peaks) <= ends + 2 * largest < whole / 3
