"""Where an SDXL comes from: folders, single files, other autoencoders; and what is refused, with the remedy."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from distill.core.errors import UserError
from distill.core.plugin_api.family import ModelSettings
from distill.model_families.sdxl import SDXL
from support.original_sdxl import write_single_file
from support.tiny_sdxl import EDGE, write_tiny_sdxl

PROMPTS = ["a red fox", "two boats"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def single(tiny):
    return write_single_file(tiny, tiny.parent / "one.safetensors")


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def no_hub(monkeypatch):
    """Any question to the hub fails at once, as without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def make(source, config=None, **settings):
    return SDXL(SDXL.Config(**(config or {})), ModelSettings(source=str(source), **settings))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(source, config=None, **settings):
    with pytest.raises(UserError) as caught:
        make(source, config, **settings).check_source()
    return str(caught.value)


def same_weights(ours, theirs):
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    return all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


# -- a single file ----------------------------------------------------------------------------------------------------


def test_a_single_file_is_the_same_model_as_its_folder(tiny, single, no_hub):
    folder, file = make(tiny), make(single, config_source=str(tiny))
    file.check_source()
    assert same_weights(file.load_network(), folder.load_network())
    for key, value in folder.encode_prompts(PROMPTS).items():
        torch.testing.assert_close(file.encode_prompts(PROMPTS)[key], value)
    pixels = torch.rand(1, 3, EDGE, EDGE) * 2 - 1
    torch.testing.assert_close(file.encode_images(pixels), folder.encode_images(pixels))
    assert (file.scale_factor, file.prediction_type) == (folder.scale_factor, folder.prediction_type)


def test_the_config_source_needs_no_weights(tiny, single, tmp_path, no_hub):
    configs = shutil.copytree(tiny, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    file = make(single, config_source=str(configs))
    file.check_source()
    assert same_weights(file.load_network(), make(tiny).load_network())
    assert set(file.encode_prompts(PROMPTS)) == {"prompt_embeds", "pooled_prompt_embeds"}


def test_a_single_file_may_mark_v_prediction_and_zero_snr(tiny, tmp_path):
    marked = write_single_file(tiny, tmp_path / "v.safetensors", markers=("v_pred", "ztsnr"))
    family = make(marked, config_source=str(tiny))
    family.check_source()
    assert family.prediction_type == "v_prediction"
    assert family.schedule.zero_terminal_snr
    family.load_network()


def test_a_single_file_without_configs_and_hub_says_what_to_set(single, no_hub):
    message = refusal(single)
    assert "one.safetensors" in message
    assert "model_config_source" in message
    assert "tokenizer" in message


def test_a_broken_single_file_is_named(single, tiny, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:-100])
    assert "cut short" in refusal(cut, config_source=str(tiny))
    cut.write_bytes(b"<html>not found</html>")
    assert "not a safetensors file" in refusal(cut, config_source=str(tiny))


def test_single_files_that_are_no_whole_sdxl_are_refused(tiny, tmp_path):
    from safetensors.torch import save_file

    def file(name, *keys):
        save_file({key: torch.zeros(1) for key in keys}, tmp_path / name)
        return refusal(tmp_path / name, config_source=str(tiny))

    assert "is a LoRA" in file("lora.safetensors", "lora_unet_down.lora_down.weight")
    alone = file("unet.safetensors", "model.diffusion_model.out.2.weight")
    assert "lacks the autoencoder, the first text encoder, the second text encoder" in alone
    first = file("sd15.safetensors", "model.diffusion_model.a", "first_stage_model.a", "cond_stage_model.a")
    assert "first text encoder" in first


# -- folders ----------------------------------------------------------------------------------------------------------


def test_local_folders_never_ask_the_hub(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    family = make(tiny)
    family.check_source()
    family.load_network()
    family.encode_prompts(PROMPTS)
    family.encode_images(torch.zeros(1, 3, EDGE, EDGE))


def test_the_only_variant_is_found_by_itself_and_a_named_one_is_taken(copy, tiny):
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for path in (copy / part).glob("*.safetensors"):
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    family = make(copy)
    family.check_source()
    assert same_weights(family.load_network(), make(tiny).load_network())
    torch.testing.assert_close(
        family.encode_prompts(PROMPTS)["prompt_embeds"], make(tiny).encode_prompts(PROMPTS)["prompt_embeds"]
    )
    make(copy, {"variant": "fp16"}).check_source()
    message = refusal(copy, {"variant": "bf16"})
    assert "variant 'bf16'" in message
    assert "model.fp16.safetensors" in message


def test_a_missing_folder_is_named_with_what_is_accepted(tmp_path, no_hub):
    message = refusal(tmp_path / "nothing")
    assert "nothing' does not exist" in message
    assert "owner/name" in message
    unreachable = refusal("no-such-owner/no-such-model")
    assert "'no-such-owner/no-such-model' is no local folder" in unreachable
    assert "without a network" in unreachable


def test_a_folder_without_an_index_points_at_the_file_in_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    message = refusal(tmp_path)
    assert "no model_index.json" in message
    assert "name that file itself" in message


def test_other_architectures_are_refused_by_name(copy):
    edit(copy / "model_index.json", _class_name="StableDiffusion3Pipeline")
    assert "is a StableDiffusion3Pipeline, not an SDXL" in refusal(copy)


def test_a_refiner_is_refused(copy):
    edit(copy / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    assert "lacks tokenizer, text_encoder" in refusal(copy)


def test_a_missing_second_text_encoder_is_named(copy):
    edit(copy / "model_index.json", text_encoder_2=[None, None])
    assert "lacks text_encoder_2" in refusal(copy)


def test_a_unet_without_micro_conditioning_or_with_extra_channels_is_refused(copy):
    edit(copy / "unet" / "config.json", addition_embed_type=None)
    assert "addition_embed_type = None" in refusal(copy)
    edit(copy / "unet" / "config.json", addition_embed_type="text_time", in_channels=9)
    assert "takes 9 channels" in refusal(copy)


def test_pickled_weights_are_never_loaded(copy, tmp_path):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    message = refusal(copy)
    assert "no safetensors weights in unet/, only diffusion_pytorch_model.bin" in message
    assert "safe_serialization=True" in message
    ckpt = tmp_path / "model.ckpt"
    ckpt.write_bytes(b"x")
    assert "convert the file to safetensors" in refusal(ckpt)


def test_missing_files_and_broken_json_are_named(copy):
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    assert "scheduler_config.json is not JSON" in refusal(copy)
    (copy / "scheduler" / "scheduler_config.json").unlink()
    assert "has no scheduler/scheduler_config.json" in refusal(copy)


def test_an_unknown_prediction_type_is_refused(copy):
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="noise")
    assert "family_config.prediction_type" in refusal(copy)


def test_a_missing_teacher_lora_is_found_before_weights_load(tiny, no_hub):
    assert "does not exist" in refusal(tiny, teacher_lora=(("./style.safetensors", 1.0),))
    assert "owner/name/file.safetensors" in refusal(tiny, teacher_lora=(("some/style", 1.0),))


# -- another autoencoder ----------------------------------------------------------------------------------------------


def test_another_autoencoder_from_its_own_folder_or_a_models(tiny, tmp_path):
    other = write_tiny_sdxl(tmp_path / "other", seed=7)
    pixels = torch.rand(1, 3, EDGE, EDGE) * 2 - 1
    expected = make(other).encode_images(pixels)
    assert not torch.allclose(make(tiny).encode_images(pixels), expected)
    for vae in (other, other / "vae"):
        family = make(tiny, vae=str(vae))
        family.check_source()
        assert torch.equal(family.encode_images(pixels), expected)
        assert family.fingerprint("vae") == make(other).fingerprint("vae")
        assert family.fingerprint("text") == make(tiny).fingerprint("text")


def test_an_autoencoder_that_does_not_fit_or_exist_is_refused(tiny, tmp_path, no_hub):
    other = write_tiny_sdxl(tmp_path / "other")
    edit(other / "vae" / "config.json", latent_channels=16)
    assert "makes 16 channels" in refusal(tiny, vae=str(other / "vae"))
    assert "neither config.json nor vae/config.json" in refusal(tiny, vae=str(tmp_path))
    assert "'nowhere' does not exist" in refusal(tiny, vae="nowhere")


# -- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprints_depend_on_the_files_not_on_their_folder(tiny, copy):
    for part in ("text", "vae", "denoiser"):
        assert make(tiny).fingerprint(part) == make(copy).fingerprint(part)
    weights = copy / "text_encoder_2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert make(tiny).fingerprint("text") != make(copy).fingerprint("text")
    assert make(tiny).fingerprint("vae") == make(copy).fingerprint("vae")
    assert make(tiny).fingerprint("denoiser") == make(copy).fingerprint("denoiser")


def test_fingerprints_differ_by_precision_and_noise(tiny):
    assert make(tiny).fingerprint("text") != make(tiny, weight_dtype="bfloat16").fingerprint("text")
    assert make(tiny).fingerprint("vae") == make(tiny, weight_dtype="bfloat16").fingerprint("vae")
    assert make(tiny).fingerprint("vae") != make(tiny, {"vae_dtype": "bfloat16"}).fingerprint("vae")
    changed = make(tiny, {"prediction_type": "v_prediction"})
    assert make(tiny).fingerprint("denoiser") != changed.fingerprint("denoiser")


def test_large_files_are_hashed_by_pieces_over_their_whole_length(tmp_path, monkeypatch):
    from distill.model_families.files import reading as files

    monkeypatch.setattr(files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(files, "CHUNKS", 8)
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)
    path = tmp_path / "weights"
    path.write_bytes(bytes(10_000))
    before = files.hash_files([path])
    for at in (0, 9_999, 5_690):
        data = bytearray(10_000)
        data[at : at + 1500] = b"\1" * min(1500, 10_000 - at)
        path.write_bytes(data)
        assert files.hash_files([path]) != before


def test_the_shipped_miniature_is_an_sdxl_where_it_is_there():
    if SDXL.miniature is None or not (SDXL.miniature / "model_index.json").is_file():
        pytest.skip("the miniature has no weights here")
    make(SDXL.miniature).check_source()
