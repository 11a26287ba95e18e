"""A model on the hub is compared with its configs before its weights are downloaded: a real client, a fake hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExportInfo, ModelSettings
from distill.model_families.files.hub import hub_answers
from distill.model_families.sdxl import SDXL
from safetensors.torch import load_file, save_file
from support.fake_hub import fake_hub
from support.listening import listening
from support.tiny_sdxl import write_tiny_sdxl

UNET = "unet/diffusion_pytorch_model.safetensors"
HEADER = 100_001
"""Bytes that the hub's client reads first of a file."""


def family(model: str, *, vae: str | None = None, **config: str) -> SDXL:
    return SDXL(SDXL.Config(**config), ModelSettings(f"someone/{model}", vae=vae and f"someone/{vae}"))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """A tiny SDXL; one whose UNet lacks a tensor and has one of another shape; autoencoders; one with shards; one with
    the variant fp16 alone, and one with it beside.
    """
    root = tmp_path_factory.mktemp("hub") / "someone"
    whole = write_tiny_sdxl(root / "whole")
    broken, text, shards = (Path(shutil.copytree(whole, root / name)) for name in ("broken", "text", "shards"))
    weights = load_file(broken / UNET)
    halves = dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])
    del weights["conv_in.bias"]
    weights["conv_out.bias"] = weights["conv_out.bias"][:2].clone()
    save_file(weights, broken / UNET)
    (text / UNET).write_bytes(b"<html>" * 1000)
    (shards / UNET).unlink()
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, shards / "unet" / name)
    where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = shards / f"{UNET}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    halves_alone, both = (Path(shutil.copytree(whole, root / name)) for name in ("halves-alone", "both"))
    for path in whole.rglob("*.safetensors"):
        half = path.relative_to(whole).with_name(path.name.replace(".safetensors", ".fp16-00001-of-00001.safetensors"))
        shutil.copy(path, both / half)
        (halves_alone / path.relative_to(whole)).rename(halves_alone / str(half).replace("-00001-of-00001", ""))
    shutil.copytree(whole, root / "half-vae", ignore=shutil.ignore_patterns("vae"))
    shutil.copytree(halves_alone / "vae", root / "half-vae" / "vae")
    vae = Path(shutil.copytree(whole / "vae", root / "vae"))
    save_file({"decoder.other": weights["conv_out.bias"]}, vae / "sdxl_vae.safetensors")  # for another program
    other = Path(shutil.copytree(vae, root / "other-vae"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "layers_per_block": config["layers_per_block"] + 1}))
    return root.parent


@pytest.fixture
def hub(repositories, tmp_path):
    with fake_hub(repositories, cache=tmp_path / "cache") as found:
        yield found


def test_weights_that_are_not_those_of_the_config_are_refused_before_they_are_downloaded(hub, tmp_path):
    """They were refused after five gigabytes had come, and after the whole dataset was encoded."""
    problem = "model 'someone/broken', unet: the weights are not those that its config describes: 1 of "
    with pytest.raises(UserError, match=re.escape(problem)) as refused:
        family("broken").check_source()
    assert "tensors are missing (conv_in.bias)" in str(refused.value)
    assert "1 are of another shape or type (conv_out.bias (2,) for (4,))" in str(refused.value)
    assert hub.weights() == {UNET: HEADER}, "its header alone"
    assert (hub.root / "someone" / "broken" / UNET).stat().st_size > 5 * HEADER
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_whole_model_is_read_by_its_headers_then_downloaded_then_not_asked_for_again(hub):
    family("whole").check_source()
    folder = hub.root / "someone" / "whole"
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*.safetensors")}
    assert len(files) == 4
    assert hub.weights() == {name: min(size, HEADER) for name, size in files.items()}
    family("whole").load_network()
    assert hub.weights()[UNET] == HEADER + files[UNET]
    hub.sent.clear()
    family("whole").check_source()
    assert UNET not in hub.sent, "it is in the cache"


def test_all_shards_of_an_index_are_read(hub):
    family("shards").check_source()
    names = [name for name in hub.weights() if name.startswith("unet/")]
    assert sorted(names) == [f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def test_without_the_hub_it_is_said_that_parts_are_compared_as_they_load(hub, monkeypatch):
    family("whole").check_source()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()
    hub.sent.clear()
    with listening() as lines:
        family("whole").check_source()
    line = "model someone/whole is on the hub, which is not asked: each part is compared with its config as it loads"
    assert lines == [line]
    assert hub.sent == {}


def test_an_autoencoder_of_its_own_is_compared_too_by_the_file_that_is_loaded(hub):
    """Repositories hold the same weights once more for other programs, which libraries do not load."""
    family("whole", vae="vae").check_source()
    assert "sdxl_vae.safetensors" not in hub.sent
    with pytest.raises(UserError, match=r"model 'someone/other-vae', vae: the weights are not those that its config"):
        family("whole", vae="other-vae").check_source()


def test_a_file_that_is_none_is_refused_by_its_name(hub):
    with pytest.raises(UserError, match=rf"model 'someone/text', header of {UNET}: .*\n.*it is no safetensors file"):
        family("text").check_source()


def test_a_variant_that_is_not_there_is_refused_before_anything_is_downloaded(hub):
    with pytest.raises(UserError, match="no unet weights of variant 'fp16', only diffusion_pytorch_model.safetensors"):
        family("whole", variant="fp16").check_source()
    assert hub.weights() == {}


def test_a_variant_that_a_repository_has_alone_is_found_and_named_in_the_snippet(hub):
    """As in Kwai-Kolors/Kolors-diffusers: it was said that there were no weights."""
    found = family("halves-alone")
    found.check_source()
    assert all(name.endswith(".fp16.safetensors") for name in hub.weights())
    expected = family("whole").load_network().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.load_network().state_dict().items())
    sampler = Sampler("LCMScheduler", {}, 4, 1.0)
    assert "variant='fp16'" in found.usage_snippet(ExportInfo(sampler, "lora"))
    assert "variant" not in family("whole").usage_snippet(ExportInfo(sampler, "lora"))
    assert "variant='fp16'" in family("half-vae").usage_snippet(ExportInfo(sampler, "lora"))


def test_shards_of_a_variant_beside_the_weights_are_not_downloaded(hub):
    found = family("both")
    found.check_source()
    found.load_network()
    assert sorted(hub.weights())
    assert not [name for name in hub.weights() if "fp16" in name]
