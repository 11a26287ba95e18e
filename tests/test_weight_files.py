"""What a model's files hold is compared with what its configs describe, before anything loads."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from distill.core.errors import UserError
from distill.core.plugin_api.family import ModelSettings
from distill.model_families.calls.schedulers import TABLE_KEYS
from distill.model_families.files.empty import empty_network
from distill.model_families.sdxl import SDXL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.original_sdxl import write_single_file
from support.tiny_families import MODELS
from support.tiny_sdxl import write_tiny_sdxl

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


def make(source, config=None, **settings):
    return SDXL(SDXL.Config(**(config or {})), ModelSettings(source=str(source), **settings))


def refusal(family):
    with pytest.raises(UserError) as caught:
        family.check_source()
    return str(caught.value)


def rewrite(file, change, *, metadata=None, to=None):
    """Write the tensors of `file` again, changed."""
    state = load_file(file)
    state = change(state) or state
    save_file({key: value.clone().contiguous() for key, value in state.items()}, to or file, metadata=metadata)
    return to or file


def without(part):
    return lambda state: {key: value for key, value in state.items() if part not in key}


def weights(folder):
    return next(folder.glob("*.safetensors"))


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_each_network_of_each_family_is_compared_with_its_config(name, tmp_path):
    tiny = MODELS[name]
    folder = tiny.write(tmp_path / "model")
    family = tiny.make(folder)
    family.check_source()
    for part in family.architecture.networks:
        file = folder / part
        if not file.is_dir():
            continue
        file = weights(file)
        whole = file.read_bytes()
        gone = rewrite_without_one(file)
        total = len(empty_network(family.architecture, part, config(folder, part)).state_dict())
        message = refusal(tiny.make(folder))
        assert f", {part}: the weights are not those that its config describes: 1 of {total} tensors are" in message
        assert gone.removeprefix("text_model.") in message
        file.write_bytes(whole)


def config(folder, part):
    return json.loads((folder / part / "config.json").read_text())


def rewrite_without_one(file):
    """Write the file without its last tensor, and return that one's name."""
    state = load_file(file)
    name = sorted(key for key in state if "embed_tokens" not in key and key != "shared.weight")[-1]
    del state[name]
    save_file(state, file)
    return name


def test_tensors_left_over_and_of_another_shape_are_named(copy):
    def change(state):
        state["up_blocks.9.bias"] = torch.zeros(3)
        state["conv_in.weight"] = torch.zeros(8, 9, 3, 3)

    rewrite(weights(copy / "unet"), change)
    message = refusal(make(copy))
    assert (
        "1 are left over (up_blocks.9.bias), 1 are of another shape or type (conv_in.weight (8, 9, 3, 3) for" in message
    )
    assert "inpainting" in message


def test_weights_that_are_quantised_are_no_weights(copy):
    rewrite(weights(copy / "unet"), lambda state: {**state, "conv_in.bias": state["conv_in.bias"].to(torch.int8)})
    assert "conv_in.bias of int8, quantised" in refusal(make(copy))
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "nf4"}}))
    assert "its unet is quantised" in refusal(make(copy))


def test_another_class_of_autoencoder_is_refused_by_name(copy):
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderTiny"}))
    assert "its vae is a AutoencoderTiny, not a AutoencoderKL" in refusal(make(copy))


def test_all_shards_of_an_index_are_compared(copy):
    state = load_file(weights(copy / "unet"))
    names = sorted(state)
    weights(copy / "unet").unlink()
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for shard, half in zip(shards, halves, strict=True):
        save_file({name: state[name] for name in half}, copy / "unet" / shard)
    where = {name: shard for shard, half in zip(shards, halves, strict=True) for name in half}
    index = copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    make(copy).check_source()
    (copy / "unet" / shards[1]).unlink()
    assert f"lacks unet/{shards[1]}, which its index names" in refusal(make(copy))


def test_a_pointer_of_git_lfs_is_called_what_it_is(copy):
    weights(copy / "unet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert "is a pointer of Git LFS" in refusal(make(copy))


def with_text_model(state):
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}


def test_names_of_older_versions_are_read(copy, tiny):
    """The attention of old autoencoders, and text encoders with and without text_model."""
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def rename(state):
        found = {}
        for name, tensor in state.items():
            for new, before in old.items():
                name = name.replace(f"attentions.0.{new}", f"attentions.0.{before}")
            found[name] = tensor
        return found

    rewrite(weights(copy / "vae"), rename)
    rewrite(
        weights(copy / "text_encoder"),
        lambda state: {f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()},
    )
    family, expected = make(copy), make(tiny)
    family.check_source()
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(family.encode_images(pixels), expected.encode_images(pixels), rtol=0, atol=0)
    for key, value in family.encode_prompts(PROMPTS).items():
        torch.testing.assert_close(value, expected.encode_prompts(PROMPTS)[key], rtol=0, atol=0)


def test_a_full_student_that_is_incomplete_is_not_loaded(tiny, tmp_path):
    """Its missing weights would be random ones, other ones at each load."""
    shutil.copytree(tiny / "unet", tmp_path / "student" / "unet")
    make(tiny).load_student(tmp_path / "student")
    rewrite(weights(tmp_path / "student" / "unet"), without("mid_block"))
    with pytest.raises(UserError, match="tensors are missing"):
        make(tiny).load_student(tmp_path / "student")


# -- a single file ----------------------------------------------------------------------------------------------------

PREFIXES = {
    "once": (r"conditioner.embedders.0.transformer.text_model.",) * 2,
    "not at all": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."),
    "twice": (
        "conditioner.embedders.0.transformer.text_model.",
        "conditioner.embedders.0.transformer.text_model.text_model.",
    ),
    "under vae": ("first_stage_model.", "vae."),
}


@pytest.mark.parametrize("layout", PREFIXES)
def test_layouts_of_real_files_are_the_same_model(tiny, single, tmp_path, layout):
    old, new = PREFIXES[layout]
    file = rewrite(
        single, lambda state: {k.replace(old, new): v for k, v in state.items()}, to=tmp_path / "x.safetensors"
    )
    same_as(tiny, file)


def test_the_second_encoder_may_have_the_names_of_its_library(tiny, single, tmp_path):
    second = load_file(weights(tiny / "text_encoder_2"))

    def change(state):
        kept = {key: value for key, value in state.items() if not key.startswith("conditioner.embedders.1.")}
        for name, tensor in second.items():
            inner = "conditioner.embedders.1.model."
            kept[f"{inner}{'' if name.startswith('text_projection') else 'transformer.'}{name}"] = tensor
        return kept

    same_as(tiny, rewrite(single, change, to=tmp_path / "x.safetensors"))


def same_as(folder, file):
    ours, expected = make(file, config_source=str(folder)), make(folder)
    ours.check_source()
    for key, value in ours.encode_prompts(PROMPTS).items():
        torch.testing.assert_close(value, expected.encode_prompts(PROMPTS)[key])
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(ours.encode_images(pixels), expected.encode_images(pixels))


def test_a_folder_and_a_file_of_the_same_weights_share_their_caches(tiny, single):
    folder, file = make(tiny), make(single, config_source=str(tiny))
    for part in ("text", "vae"):
        assert folder.fingerprint(part) == file.fingerprint(part)


def test_inpainting_pruned_and_larger_siblings_are_refused_before_they_load(tiny, single, tmp_path):
    def inpainting(state):
        key = "model.diffusion_model.input_blocks.0.0.weight"
        state[key] = torch.cat([state[key]] * 3, dim=1)[:, :9]

    def larger(state):
        key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0."
        state |= {k.replace(".0.attn1", ".7.attn1"): v for k, v in state.items() if k.startswith(key + "attn1")}

    pruned = without("model.diffusion_model.middle_block.1.")
    expected = {
        inpainting: "1 are of another shape or type (conv_in.weight (",
        larger: "are left over",
        pruned: "tensors are missing (mid_block",
    }
    for number, (change, words) in enumerate(expected.items()):
        file = rewrite(single, change, to=tmp_path / f"{number}.safetensors")
        message = refusal(make(file, config_source=str(tiny)))
        assert words in message
        assert "unet" in message


def test_another_autoencoder_stands_in_for_the_one_that_a_file_lacks(tiny, single, tmp_path):
    file = rewrite(single, without("first_stage_model."), to=tmp_path / "x.safetensors")
    assert "pretrained_vae_model_name_or_path" in refusal(make(file, config_source=str(tiny)))
    family = make(file, config_source=str(tiny), vae=str(tiny / "vae"))
    family.check_source()
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(family.encode_images(pixels), make(tiny).encode_images(pixels))


def test_one_stray_key_makes_no_lora_of_a_model(tiny, single, tmp_path):
    file = rewrite(single, lambda state: {**state, "lora_unet_x.alpha": torch.ones(1)}, to=tmp_path / "x.safetensors")
    make(file, config_source=str(tiny)).check_source()


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_scales_of_weights_in_eight_bits_are_applied(tiny, single, tmp_path, ending):
    key = "model.diffusion_model.input_blocks.0.0"

    def scaled(state):
        state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        state[f"{key}.{ending}"] = torch.tensor(0.01)
        state[f"{key}.weight"] = (state[f"{key}.weight"] / 0.01).to(torch.float8_e4m3fn)

    family = make(rewrite(single, scaled, to=tmp_path / "x.safetensors"), config_source=str(tiny))
    family.check_source()
    ours, whole = family.load_network().state_dict(), make(tiny).load_network().state_dict()
    expected = (whole["conv_in.weight"] / 0.01).to(torch.float8_e4m3fn).float() * 0.01
    torch.testing.assert_close(ours["conv_in.weight"], expected)
    assert torch.equal(ours["conv_out.weight"], whole["conv_out.weight"])


# -- what a file says of its noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.predict_key": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "V-Prediction"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
        ({"ss_v_parameterization": "False", "modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.title": "v"}, "epsilon"),
    ],
)
def test_signs_of_v_prediction_in_the_header_are_read(tiny, single, tmp_path, metadata, prediction):
    file = rewrite(single, lambda state: None, metadata=metadata, to=tmp_path / "x.safetensors")
    assert make(file, config_source=str(tiny)).prediction_type == prediction


def test_a_sign_of_zero_terminal_snr_in_the_header_is_read(tiny, single, tmp_path):
    file = rewrite(single, lambda state: None, metadata={"ss_zero_terminal_snr": "True"}, to=tmp_path / "x.safetensors")
    assert make(file, config_source=str(tiny)).schedule.zero_terminal_snr


def test_signs_that_contradict_each_other_ask_for_a_setting(tiny, single, tmp_path):
    file = rewrite(
        single,
        lambda state: {**state, "v_pred": torch.zeros(0)},
        metadata={"modelspec.prediction_type": "epsilon"},
        to=tmp_path / "x.safetensors",
    )
    message = refusal(make(file, config_source=str(tiny)))
    assert (
        "contradicts itself: tensor v_pred says v_prediction, modelspec.prediction_type = 'epsilon' says epsilon"
        in message
    )
    assert "family_config.prediction_type" in message
    chosen = make(file, {"prediction_type": "epsilon"}, config_source=str(tiny))
    chosen.check_source()
    assert chosen.prediction_type == "epsilon"


def test_a_config_that_says_v_is_not_overruled_by_a_header_that_says_epsilon(tmp_path):
    v = write_tiny_sdxl(tmp_path / "v", prediction_type="v_prediction")
    file = write_single_file(v, tmp_path / "v.safetensors")
    assert make(file, config_source=str(v)).prediction_type == "v_prediction"
    rewrite(file, lambda state: None, metadata={"modelspec.prediction_type": "epsilon"})
    assert "scheduler_config.json says v_prediction" in refusal(make(file, config_source=str(v)))


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_files_of_edm_are_refused_by_name(tiny, single, tmp_path, marker):
    file = rewrite(single, lambda state: {**state, marker: torch.ones(1)}, to=tmp_path / "x.safetensors")
    assert f"EDM's noise ({marker})" in refusal(make(file, config_source=str(tiny)))


def test_a_resolution_far_from_the_runs_is_said(tiny, single, tmp_path, caplog):
    file = rewrite(
        single, lambda state: None, metadata={"modelspec.resolution": "1024x1024"}, to=tmp_path / "x.safetensors"
    )
    with caplog.at_level("WARNING"):
        make(file, config_source=str(tiny), resolution=(512, 512)).check_source()
    assert "made for images of 1024 x 1024 (modelspec.resolution), this run trains at 512 x 512" in caplog.text


# -- schedulers -------------------------------------------------------------------------------------------------------


def classes():
    """Schedulers of diffusers that have a table of betas."""
    import inspect

    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
        if scheduler and set(inspect.signature(kind.__init__).parameters) >= TABLE_KEYS:
            yield name


@pytest.mark.parametrize("name", sorted(classes()))
def test_keys_that_a_config_lacks_are_those_of_its_class(copy, name):
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    family, theirs = make(copy), getattr(diffusers, name)()
    if name.startswith("CogVideoX"):  # it changes its table by a shift of the SNR
        assert f"the noise of its scheduler {name} is not the table" in refusal(family)
        return
    family.check_source()
    ours = family.schedule.alpha(torch.arange(1000)) ** 2
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)
    assert family.prediction_type == theirs.config.get("prediction_type", "epsilon")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "has the scheduler EDMEulerScheduler, whose noise is neither"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "whose noise is neither"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "whose noise is neither"),
        ({"_class_name": "HeliosScheduler"}, "whose noise is neither"),
        ({"_class_name": "MyScheduler"}, "which this version of diffusers lacks"),
        ({}, "scheduler None, which"),
        ({"_class_name": "UNet2DConditionModel"}, "which this version of diffusers lacks"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "is trained on a flow"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not known"),
    ],
)
def test_schedulers_without_a_schedule_here_are_refused_by_name(copy, config, words):
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert words in refusal(make(copy))


def test_the_header_is_all_that_a_check_reads(single, tiny, monkeypatch):
    """No value of a tensor is asked for."""

    def refuse(*arguments):
        raise AssertionError("read a tensor")

    monkeypatch.setattr("distill.model_families.files.weights.WeightFile.read_one", refuse)
    monkeypatch.setattr("distill.model_families.files.weights.WeightFile.stored", refuse)
    monkeypatch.setattr(safe_open, "get_tensor", refuse, raising=False)
    make(single, config_source=str(tiny)).check_source()
    make(tiny).check_source()
