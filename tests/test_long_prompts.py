"""Captions and prompts that are longer than the text encoders read: counted, said, and read in chunks by CLIP."""

import json

import pytest
import torch
from distill.core.evaluation.prompts import cut_prompts, encoded
from distill.core.plugin_api.family import ModelSettings
from distill.model_families.calls.encoders import chunked_ids, token_ids
from distill.model_families.sd2x import SD2x
from distill.model_families.sdxl import SDXL
from safetensors.torch import load_file
from support.config_files import distill, said
from support.data_helpers import FakeFamily, entry, fill, pipeline
from support.small_run import execute, write_run
from support.sources import SMALL_SDXL

LONG = "a red cat on a green hill under a blue sky with one white cloud and a black bird beside the yellow house"


def family(kind=SDXL, **config):
    return kind(kind.Config(**config), ModelSettings(source=str(SMALL_SDXL if kind is SDXL else kind.miniature)))


def words(count: int) -> str:
    return " ".join((LONG.split() * 10)[:count])


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SDXL, SD2x])
def test_each_chunk_is_encoded_alone_with_its_own_marks(kind):
    """The states of a long prompt are those of its parts, as prompts of their own, one after the other."""
    one, three = family(kind), family(kind, max_prompt_chunks=3)
    text = three._text_encoders()
    tokenizer = text.pairs()[0][0]
    size = tokenizer.model_max_length - 2
    whole_words = [word for word in LONG.split() if len(tokenizer(word, add_special_tokens=False).input_ids) == 1]
    prompt = " ".join((whole_words * 20)[: 3 * size - 4])
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    assert len(ids) > 2 * size, "the prompt fills three chunks"
    parts = [tokenizer.decode(ids[at : at + size]) for at in range(0, 3 * size, size)]
    assert [tokenizer(part, add_special_tokens=False).input_ids for part in parts] == [
        ids[at : at + size] for at in range(0, 3 * size, size)
    ]
    whole, alone = three.encode_prompts([prompt]), one.encode_prompts(parts)
    width = alone["prompt_embeds"].shape[-1]
    assert whole["prompt_embeds"].shape == (1, 3 * tokenizer.model_max_length, width)
    torch.testing.assert_close(whole["prompt_embeds"], alone["prompt_embeds"].reshape(1, -1, width))
    if kind is SDXL:
        torch.testing.assert_close(whole["pooled_prompt_embeds"], alone["pooled_prompt_embeds"][:1])


def test_a_short_prompt_is_followed_by_empty_chunks():
    one, two = family(), family(max_prompt_chunks=2)
    short, empty = one.encode_prompts(["a cat", ""])["prompt_embeds"]
    torch.testing.assert_close(two.encode_prompts(["a cat"])["prompt_embeds"][0], torch.cat([short, empty]))


def test_one_chunk_is_what_the_tokenizer_makes():
    text = family()._text_encoders()
    for tokenizer, _ in text.pairs():
        prompts = ["", "a cat", words(22), words(60)]
        theirs, ours = token_ids(tokenizer, prompts), chunked_ids(tokenizer, prompts, 1)
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.attention_mask, theirs.attention_mask)


def test_chunks_have_a_cache_of_their_own_and_one_chunk_keeps_the_old():
    prints = [family(max_prompt_chunks=chunks).fingerprint("text") for chunks in (1, 2, 3)]
    assert prints[0] == family().fingerprint("text")
    assert len(set(prints)) == 3


# -- counting ---------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_as_they_are_read():
    for chunks, limit in ((1, 22), (4, 88)):
        model = family(max_prompt_chunks=chunks)
        assert model.max_prompt_tokens == limit
    assert model.count_tokens([]) == []
    tokenizer = model._tokenizer
    for prompt in ("", "a cat", words(60)):
        assert model.count_tokens([prompt]) == [len(tokenizer(prompt, verbose=False).input_ids) - 2]
    count = model.count_tokens([words(60)])[0]
    needed = -(-count // 22)
    assert f"max_prompt_chunks to {needed} " in family().long_prompts_remedy(count)
    enough = family(max_prompt_chunks=needed)
    assert not cut_prompts(enough, [words(60)])


def test_a_cut_prompt_is_shown_from_where_it_is_cut():
    model, prompt = family(), words(40)
    (line,) = cut_prompts(model, ["a cat", prompt])
    shown = line.split("cut off is ")[1].split("...")[0].strip('"')
    read = prompt[: prompt.index(shown, 20)] if shown in prompt else ""
    assert model.count_tokens([read])[0] <= 22
    assert model.count_tokens([f"{read}{shown.split()[0]}"])[0] > 22
    head = encoded(model, [prompt])["prompt_embeds"], encoded(model, [f"{prompt} and more"])["prompt_embeds"]
    assert torch.equal(*head), "what is cut off has no effect"


class Words(FakeFamily):
    """Reads three words."""

    max_prompt_tokens = 3

    def count_tokens(self, prompts):
        self.counted = [*getattr(self, "counted", []), *prompts]
        return [len(prompt.split()) for prompt in prompts]

    def long_prompts_remedy(self, num_tokens):
        return f"read {num_tokens}"


def test_captions_of_used_images_are_counted_in_console_and_report(tmp_path):
    folder = fill(tmp_path / "set", [(32, 32)] * 4)
    for name, text in (("000", "one two three"), ("001", "one two three four"), ("002", "one two three five six\na b")):
        (folder / f"{name}.txt").write_text(text)
    (folder / "003.txt").unlink()
    model = Words()
    data, lines = pipeline(entry(folder), root=tmp_path, family=model)
    wanted = (
        "dataset 'set': 2 of 4 captions are longer than the 3 tokens that the text encoders read, and are cut off "
        "there (the longest has 5): read 5"
    )
    assert wanted in data.describe()
    (report,) = data.write_reports(tmp_path / "out")
    assert "| captions cut off | 2 of 4 captions are longer than the 3 tokens" in report.text
    assert "2 of 4" in json.loads((report.folder / "report.json").read_text())["cut"]
    data.prepare()
    assert wanted in lines
    assert "a b" not in model.counted, "a caption of three bytes has no more tokens than three"


def test_of_very_many_captions_a_sample_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.core.data.report.cut_captions.SAMPLE", 5)
    folder = fill(tmp_path / "set", [(32, 32)] * 20)
    for number in range(0, 20, 2):
        (folder / f"{number:03d}.txt").write_text("one two three four")
    data, _ = pipeline(entry(folder), root=tmp_path, family=Words())
    assert any("about 20 of 20 captions are longer" in line for line in data.describe())


def test_a_run_in_chunks_reads_the_ends_of_captions_and_its_student_needs_none(tmp_path):
    """Four captions that differ at their ends: one embedding, and said so; four of them in chunks."""
    from diffusers import StableDiffusionXLPipeline
    from support.small_run import write_images

    images = write_images(tmp_path / "images", 4)
    for number in range(4):
        (images / f"{number:02d}.txt").write_text(f"{'a b ' * 10}{'cdef'[number]}\n")
    settings = {"validation_step_interval": 0, "max_train_steps": 2, "validation_prompt": "a noise " * 60}
    different = []
    for chunks in (1, 2):
        part = {"sdxl": {"max_prompt_chunks": chunks}}
        config = write_run(tmp_path, output=f"out{chunks}", family_config=part, **settings)
        result, lines = execute(config)
        embeds = [
            each
            for file in (tmp_path / f"out{chunks}" / "cache" / "text").rglob("*.safetensors")
            for each in load_file(file)["prompt_embeds"]
        ]
        different.append((len(embeds), len({each.numpy().tobytes() for each in embeds}), embeds[0].shape[0]))
        assert any("4 of 4 captions are longer" in line for line in lines) == (chunks == 1)
    assert different == [(4, 1, 16), (4, 4, 32)]
    made = distill("generate", tmp_path / "out2", "--prompt", "a noise " * 100, "--out", tmp_path / "x.png")
    assert made.exit_code == 0, made.output
    assert "of which the text encoders read 28; cut off is" in said(made.stderr)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(result.student)
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "width": 32, "height": 32, "output_type": "np"}
    assert pipe("a noise", **call).images.shape == (1, 32, 32, 3)
