"""Latents that are decoded with a gradient: one sample at a time, layers computed again, by a tiny autoencoder too."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.config.requirements import check_requirements
from distill.core.engine.networks import Networks
from distill.core.errors import ConfigError, UserError
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import ModelSettings
from distill.core.plugin_api.method import Role
from distill.core.registry.registry import Registry
from distill.core.runs.planned_memory import planned_memory
from distill.core.settings.run_settings import RunSettings
from distill.core.utils.memory import MemorySettings, estimate, savings
from distill.distill_methods.lcm import LCM
from distill.distill_methods.reward import Reward
from distill.model_families.calls.pixels import decoding_bytes
from distill.model_families.sdxl import SDXL
from support.networks import MeanRed, network_file
from support.quickstart import command
from support.small_run import execute, write_run
from support.tiny_sdxl import SCALE_FACTOR, write_tiny_sdxl

SIZE, EDGE = 3, 6
SDXLS_OWN = {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
             "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4}  # fmt: skip
TAESDXL = {"_class_name": "AutoencoderTiny", "latent_channels": 4, "decoder_block_out_channels": [64] * 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("pixels") / "model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny autoencoder of the tiny model's latents."""
    from diffusers import AutoencoderTiny

    place = tmp_path_factory.mktemp("pixels") / "taesd"
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4, **widths)
    vae.save_pretrained(place)
    return place


def make(folder, **settings):
    family = SDXL(SDXL.Config(), ModelSettings(str(folder), **settings))
    networks = Networks(family, [Role("teacher")], lora=None, seed=0)
    return family, Context(Runtime(family, networks, seed=0, device=torch.device("cpu")), positions=range(SIZE))


def latents(*, dtype=torch.float64):
    return torch.randn(SIZE, 4, EDGE, EDGE, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def slope(images):
    """Something of the images that no two pixels count alike in."""
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(images)
    return (weights * images.square()).sum()


@pytest.mark.parametrize("other", [False, True], ids=["own", "tiny"])
def test_the_gradient_is_that_of_a_plain_decoding_of_the_whole_batch(folder, tiny, other):
    family, context = make(folder, pixel_decoder=str(tiny) if other else None)
    family.load_pixel_decoder()
    vae = family._pixel_decoder.double()
    assert type(vae).__name__ == ("AutoencoderTiny" if other else "AutoencoderKL")
    x, plain = latents(), latents()
    images = context.decode(x)
    expected = vae.decode(plain / vae.config.scaling_factor, return_dict=False)[0] * 0.5 + 0.5
    assert images.shape == (SIZE, 3, SCALE_FACTOR * EDGE, SCALE_FACTOR * EDGE)
    torch.testing.assert_close(images, expected, rtol=1e-10, atol=1e-12)
    (ours,), (theirs,) = torch.autograd.grad(slope(images), x), torch.autograd.grad(slope(expected), plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert theirs.flatten(1).norm(dim=1).min() > 0
    assert not any(weight.requires_grad for weight in vae.parameters())
    assert not any("forward" in vars(module) for module in vae.modules()), "nothing stays behind"


def test_images_are_those_of_validation_but_for_the_clamp(folder):
    family, context = make(folder)
    x = (20 * latents(dtype=torch.float32)).detach()
    images = context.decode(x)
    assert images.min() < 0 or images.max() > 1, "a clamp would have no gradient there"
    torch.testing.assert_close(images.clamp(0, 1), family.decode_latents(x), rtol=1e-5, atol=1e-5)


def kept_bytes(function) -> int:
    """What the graph of a result keeps for the backward pass, each storage once."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = function()
    assert held.requires_grad
    return sum(kept.values())


def test_a_batch_keeps_its_latents_alone_and_a_sample_the_inputs_of_layers(folder):
    family, context = make(folder)
    family.load_pixel_decoder()
    vae, x = family._pixel_decoder, latents(dtype=torch.float32)
    of_batch = kept_bytes(lambda: context.decode(x))
    of_sample = kept_bytes(lambda: context.decode(x[:1]))
    plain = kept_bytes(lambda: vae.decode(x[:1], return_dict=False)[0])
    assert of_batch <= 2 * x.numel() * 4
    assert of_sample < 0.6 * plain


def test_mixed_precision_leaves_the_autoencoder_its_own_type(folder):
    family, _ = make(folder, weight_dtype="float16")
    images = family.decode_pixels(latents(dtype=torch.float32).detach())
    assert (family._pixel_decoder.dtype, images.dtype) == (torch.float32, torch.float32), "SDXL's overflows in fp16"


def test_what_decodes_stays_when_the_encoders_are_released(folder, tiny):
    own, _ = make(folder)
    own.load_pixel_decoder()
    kept = own._pixel_decoder
    own.encode_prompts(["a"])
    own.release_encoders()
    assert own._vae is own._pixel_decoder is kept, "one copy"
    assert own._text is None
    other, _ = make(folder, pixel_decoder=str(tiny))
    other.load_pixel_decoder()
    other.decode_latents(torch.zeros(1, 4, EDGE, EDGE))
    other.release_encoders()
    assert other._vae is None
    assert other._pixel_decoder is not None
    plain, _ = make(folder)
    plain.decode_latents(torch.zeros(1, 4, EDGE, EDGE))
    plain.release_encoders()
    assert plain._vae is None, "without a method that decodes nothing is kept"


# -- before weights load ----------------------------------------------------------------------------------------------


def test_a_family_that_cannot_decode_is_refused():
    class Blind(SDXL):
        name = "blind"
        capabilities = replace(SDXL.capabilities, pixels=False)

    config = Reward.Config(network=network_file(MeanRed))
    (finding,), _ = check_requirements(Reward, config, Blind, RunSettings(distillation_method="reward"))
    assert finding.key == "model_family"
    assert finding.problem == (
        "the method 'reward' (model_type lora) needs images that are decoded with a gradient (pixels), which the "
        "family 'blind' lacks"
    )
    assert check_requirements(LCM, LCM.Config(), Blind, RunSettings()) == ([], [])


def test_a_decoder_that_nothing_uses_is_said_to_have_no_effect():
    notice = "pixel_decoder has no effect: the method 'lcm' decodes nothing in training"
    assert check_requirements(LCM, LCM.Config(), SDXL, RunSettings(pixel_decoder="a/b")) == ([], [notice])
    reward = check_requirements(Reward, Reward.Config(), SDXL, RunSettings(pixel_decoder="a/b"))
    assert reward == ([], [])


def test_a_decoder_of_other_latents_another_class_or_without_weights_is_refused(folder, tiny, tmp_path):
    def refused(text, **changes):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(tiny, place)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, **changes}))
        if not changes:
            for file in place.glob("*.safetensors"):
                file.unlink()
        with pytest.raises(UserError, match="pixel_decoder = ") as error:
            make(folder, pixel_decoder=str(place))[0].check_source()
        assert text in str(error.value)

    refused("decodes 16 channels to 2 pixels per latent, and this model's latents have 4 channels", latent_channels=16)
    refused("is of the class AutoencoderDC", _class_name="AutoencoderDC")
    refused("has no safetensors weights")
    make(folder, pixel_decoder=str(tiny))[0].check_source()


def test_a_decoder_that_is_not_there_is_a_finding_with_its_key(tmp_path):
    config = write_run(tmp_path, pixel_decoder="./nowhere")
    with pytest.raises(ConfigError, match=r"pixel_decoder = .*nowhere': does not exist"):
        execute(config)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_sdxls_autoencoder_at_1024_pixels_is_estimated_as_it_was_measured():
    """2.59 GB at 512 x 512 in fp32 beside the weights' 0.33 GB, four times that at 1024 x 1024."""
    own = decoding_bytes(SDXLS_OWN, 1024**2, item=4)
    assert own == pytest.approx(4 * 2.59e9 + 0.33e9, rel=0.02)
    assert decoding_bytes(TAESDXL, 1024**2, item=4) == pytest.approx(4 * 0.68e9, rel=0.02)


def test_doctor_counts_what_decodes_and_what_is_loaded_beside(tmp_path, folder):
    own = {"reward": {"network": str(network_file(MeanRed))}}
    shared = {"model": folder, "validation_step_interval": 0}
    config = write_run(tmp_path, distillation_method="reward", distillation_config=own, **shared)
    memory = command("doctor", "--config", str(config)).out.partition("\nmemory\n")[2].partition("\n\n")[0]
    figures = {line.split()[0]: line.split()[1] for line in memory.splitlines()}
    assert float(figures["decoding"]) > 0.5
    assert figures["auxiliary"] == f"{network_file(MeanRed).stat().st_size / 1e6:.0f}"
    registry = Registry.load(installed=False)
    plain = load_configuration(registry, config_file=write_run(tmp_path, output="plain", **shared))
    planned = planned_memory(plain, registry)
    assert planned is not None
    assert planned.decoding_bytes == planned.auxiliary_bytes == 0


def test_a_tiny_autoencoder_is_among_what_saves_memory():
    settings = MemorySettings(2_600_000_000, 100_000_000, 128 * 128, decoding_bytes=10_700_000_000)
    assert estimate(settings).total - estimate(replace(settings, decoding_bytes=0)).total == 10_700_000_000
    labels = dict(savings(settings))
    assert labels["pixel_decoder=NAME of a tiny autoencoder (TAESD)"] > 5_000_000_000
    assert "pixel_decoder" not in " ".join(dict(savings(replace(settings, decoding_bytes=0))))
    assert "pixel_decoder" not in " ".join(dict(savings(replace(settings, own_decoder=False))))  # it has one already
