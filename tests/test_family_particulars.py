"""What is particular to single families: values of their shifts, templates, tables and refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExportInfo
from distill.core.registry.registry import Registry
from distill.model_families.loras.lora_loading import loads_loras, with_adapters, with_lora_files
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from support.listening import listening
from support.tiny_families import NEWER
from support.tiny_lumina2 import LUMINA2
from support.tiny_pixart import PIXART, write_tiny_pixart


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a tiny model, written once."""
    written = {}

    def of(name):
        if name not in written:
            written[name] = NEWER[name].write(tmp_path_factory.mktemp("particulars") / name)
        return written[name]

    return of


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- CogView4 ---------------------------------------------------------------------------------------------------------


def test_cogview4_shifts_noise_by_the_root_of_the_resolution_and_tells_unshifted_whole_times(folder):
    family = NEWER["cogview4"].make(folder("cogview4"))
    family.scheduler_config["base_image_seq_len"] = 256  # as published
    assert family.shift_at(4096) == pytest.approx(0.75 * 4 + 0.25)
    assert family.shift_at(1024) == pytest.approx(0.75 * 2 + 0.25)
    u = torch.linspace(1000, 1, 50).to(torch.int64).float() / 1000
    for positions in (1024, 4096):
        m = family.shift_at(positions)
        told = family.told(m * u / (1 + (m - 1) * u), num_positions=positions)
        assert torch.equal(told, (1000 * u).round())


def test_a_cogview4_student_is_called_with_both_noise_levels_and_times(folder):
    family = NEWER["cogview4"].make(folder("cogview4"))
    m = family.noise_config["shift"]
    assert family.schedule.shift == m == pytest.approx(0.75 * 2 + 0.25), "64 positions of 32 pixels, 16 are the base"
    sigmas = [m * u / (1 + (m - 1) * u) for u in (1.0, 0.75, 0.25)]
    sampler = Sampler("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, 3, 0.0, {"sigmas": sigmas})
    call = family.snippet_call(ExportInfo(sampler, "lora"))
    assert call == {"guidance_scale": 0.0, "max_sequence_length": 60, "timesteps": [1000, 750, 250]}
    assert f"timesteps=[1000, 750, 250], sigmas={sigmas!r}" in family.usage_snippet(ExportInfo(sampler, "lora"))


def test_a_cogview4_prompt_is_encoded_as_if_it_were_alone(folder):
    family = NEWER["cogview4"].make(folder("cogview4"))
    prompts = ["a", "fourteen marks", "a long prompt, longer than the others are"]
    batch = family.encode_prompts(prompts)
    for row, prompt in enumerate(prompts):
        alone = family.encode_prompts([prompt])
        for key, value in alone.items():
            torch.testing.assert_close(batch[key][row : row + 1], value, rtol=0, atol=1e-6)
    assert batch["prompt_attention_mask"].sum(dim=1).tolist() == [16, 16, 48]


# -- Lumina-Image 2.0 -------------------------------------------------------------------------------------------------


def test_lumina2_writes_its_system_prompt_before_prompts_but_not_before_the_empty_one(folder):
    family = LUMINA2.make(folder("lumina2"))
    own = LUMINA2.make(folder("lumina2"), {"system_prompt": "Paint:"})
    assert own.written(None, ["a fox"]) == ["Paint: <Prompt Start> a fox"]
    assert own.fingerprint("text") != family.fingerprint("text")
    lengths = own.encode_prompts(["a fox", ""])["prompt_attention_mask"].sum(dim=1).tolist()
    assert lengths == [1 + len("Paint: <Prompt Start> a fox"), 1]
    assert own.encode_negative(["a fox"])["prompt_attention_mask"].sum() == 1 + len("a fox")
    assert own.max_prompt_tokens == 244 - len("Paint: <Prompt Start> ")
    sampler = Sampler("FlowMatchEulerDiscreteScheduler", {}, 2, 3.0)
    call = own.snippet_call(ExportInfo(sampler, "lora"))
    assert call["system_prompt"] == "Paint:"
    assert call["cfg_normalization"] is False
    assert "system_prompt" not in family.snippet_call(ExportInfo(sampler, "lora"))
    with pytest.raises(ValidationError, match="less than or equal to 299"):
        type(family).Config(max_sequence_length=300)


def test_a_copy_has_the_tables_of_positions_that_no_file_has(folder):
    family = LUMINA2.make(folder("lumina2"))
    teacher = family.load_network()
    copy = family.student_network(teacher, guidance_embedding=False)
    for ours, expected in zip(copy.rope_embedder.freqs_cis, teacher.rope_embedder.freqs_cis, strict=True):
        assert torch.equal(ours, expected)


# -- PixArt-Sigma -----------------------------------------------------------------------------------------------------


def test_pixart_alpha_is_refused(tmp_path):
    folder = write_tiny_pixart(tmp_path / "alpha", alpha=True)
    with pytest.raises(UserError, match=r"takes sizes as an input, as PixArt-alpha(?s:.)*name a PixArt-Sigma"):
        PIXART.make(folder).check_source()


def test_the_older_name_of_pixarts_transformer_is_the_same_network(tmp_path, folder):
    older = shutil.copytree(folder("pixart-sigma"), tmp_path / "older")
    edit(older / "transformer" / "config.json", _class_name="Transformer2DModel")
    family = PIXART.make(older)
    family.check_source()
    ours, expected = (one.load_network().state_dict() for one in (family, PIXART.make(folder("pixart-sigma"))))
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())


def test_pixarts_table_of_positions_is_not_rounded_with_the_weights(folder):
    half = PIXART.make(folder("pixart-sigma"), weight_dtype="bfloat16").load_network()
    full = PIXART.make(folder("pixart-sigma")).load_network()
    assert half.transformer_blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert torch.equal(half.pos_embed.pos_embed, full.pos_embed.pos_embed)


def test_only_what_takes_no_loras_learns_it_and_keeps_its_name():
    import diffusers

    for kind in (diffusers.UNet2DConditionModel, diffusers.Lumina2Transformer2DModel):
        assert with_adapters(kind) is kind
    assert with_lora_files(diffusers.StableDiffusionXLPipeline, "unet") is diffusers.StableDiffusionXLPipeline
    network, pipeline = diffusers.PixArtTransformer2DModel, diffusers.PixArtSigmaPipeline
    assert not loads_loras(pipeline, "transformer")
    for kind, learnt in ((network, with_adapters(network)), (pipeline, with_lora_files(pipeline, "transformer"))):
        assert (learnt.__name__, learnt.__module__) == (kind.__name__, kind.__module__)
        assert issubclass(learnt, kind)
    assert with_adapters(network) is with_adapters(network)


# -- Kolors -----------------------------------------------------------------------------------------------------------


def test_kolors_has_its_own_table_and_an_sdxl_is_none(tmp_path, folder):
    family = NEWER["kolors"].make(folder("kolors"))
    assert family.schedule.num_train_timesteps == 1100
    betas = torch.linspace(0.00085**0.5, 0.014**0.5, 1100, dtype=torch.float64) ** 2
    alpha = family.schedule.alpha(torch.tensor([1099]))
    torch.testing.assert_close(alpha.double(), (1 - betas).prod().sqrt().reshape(1), rtol=1e-6, atol=0)
    other = shutil.copytree(folder("kolors"), tmp_path / "other")
    edit(other / "unet" / "config.json", encoder_hid_dim_type=None)
    with pytest.raises(UserError, match=r"is not a Kolors \(unet/config.json: encoder_hid_dim_type = None"):
        NEWER["kolors"].make(other).check_source()


# -- what published repositories hold ---------------------------------------------------------------------------------


def as_causal_lm_saves_it(folder):
    """Rename the text encoder's tensors as in a file of the whole language model, head included."""
    path = folder / "text_encoder" / "model.safetensors"
    found = load_file(path)
    saved = {f"model.{name}": value for name, value in found.items()}
    save_file({**saved, "lm_head.weight": found["embed_tokens.weight"].clone()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["z-image", "cogview4"])
def test_a_text_encoder_may_be_the_file_of_a_language_model_with_its_head(folder, tmp_path, name):
    """Z-Image's config names Qwen3ForCausalLM, CogView4 was converted with GlmForCausalLM: the class has no head."""
    whole = shutil.copytree(folder(name), tmp_path / "whole")
    as_causal_lm_saves_it(whole)
    family = NEWER[name].make(whole)
    family.check_source()
    expected = NEWER[name].make(folder(name)).encode_prompts(["a fox"])
    for key, value in family.encode_prompts(["a fox"]).items():
        assert torch.equal(value, expected[key])


def test_the_tokenizer_of_flux2_dev_keeps_its_spaces_and_pads_in_front(folder, tmp_path):
    """Its config names LlamaTokenizerFast, and its file holds bytes; its template may be the processor's."""
    published = shutil.copytree(folder("flux2-dev"), tmp_path / "published")
    settings = published / "tokenizer" / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    for key in ("padding_side", "chat_template"):
        kept.pop(key, None)
    settings.write_text(json.dumps({**kept, "tokenizer_class": "LlamaTokenizerFast"}))
    template = published / "tokenizer" / "chat_template.jinja"
    (published / "tokenizer" / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    found, own = (NEWER["flux2-dev"].make(one) for one in (published, folder("flux2-dev")))
    with listening() as lines:
        tokens = found.tokens(found._tokenizer, ["a fox in the snow"])
    assert lines == []
    expected = own.tokens(own._tokenizer, ["a fox in the snow"])
    assert tokens.input_ids.tolist() == expected.input_ids.tolist()
    assert tokens.attention_mask.tolist() == expected.attention_mask.tolist()
    short = found._tokenizer("a fox", padding="max_length", max_length=8)
    assert short.attention_mask == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["chroma", "pixart-sigma", "kolors"])
def test_published_tokenizers_without_a_tokenizer_json_need_sentencepiece(name):
    assert Registry.load(installed=False).get("family", name).packages == {"sentencepiece": "sentencepiece>=0.2"}


def test_a_z_image_tokenizer_may_pad_in_front(folder, tmp_path):
    """The pipeline takes states by their mask; here they stand before the padding."""
    other = shutil.copytree(folder("z-image"), tmp_path / "other")
    edit(other / "tokenizer" / "tokenizer_config.json", padding_side="left")
    expected = NEWER["z-image"].make(folder("z-image")).encode_prompts(["a fox"])
    for key, value in NEWER["z-image"].make(other).encode_prompts(["a fox"]).items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("key", ["use_exponential_sigmas", "use_karras_sigmas", "invert_sigmas"])
def test_a_students_sigmas_are_those_of_its_method_whatever_the_teachers_scheduler_does(folder, tmp_path, key):
    other = shutil.copytree(folder("chroma"), tmp_path / "other")
    edit(other / "scheduler" / "scheduler_config.json", **{key: True}, stochastic_sampling=True)
    sigmas = [1.0, 0.6, 0.3]
    sampler = Sampler("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, 3, 1.0, {"sigmas": sigmas})
    scheduler = NEWER["chroma"].make(other).scheduler(sampler)
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0])
    assert scheduler.config.stochastic_sampling is False


def test_chroma_hd_has_no_shift_and_two_keys_of_flux_in_its_config(folder, tmp_path):
    """Issue 12112 of diffusers: its steps go from 1000 down by 25, and its config has what its class does not take."""
    published = shutil.copytree(folder("chroma"), tmp_path / "published")
    edit(published / "transformer" / "config.json", guidance_embeds=False, pooled_projection_dim=768)
    edit(published / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    family = NEWER["chroma"].make(published)
    family.check_source()
    assert family.schedule.shift == 1.0
    ours, expected = (one.load_network().state_dict() for one in (family, NEWER["chroma"].make(folder("chroma"))))
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    assert family.student_network(family.load_network(), guidance_embedding=False).config["num_layers"] == 2
