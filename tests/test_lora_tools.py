"""LoRAs on files: the difference of two models, other ranks, sums and fused models, by their values."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from distill.core.plugin_api.family import ModelSettings
from distill.core.plugin_api.lora_tools import LoraReport, LoraTools, LowRank
from distill.model_families.loras.low_rank import nearest, nearest_product
from distill.model_families.sdxl import SDXL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.config_files import distill, said
from support.small_run import execute, write_run
from support.tiny_sdxl import EDGE, write_tiny_sdxl

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) * 0.1


def unet(folder):
    return load_file(next((folder / "unet").glob("*.safetensors")))


def lora_on(state, folder, *, name, rank=3, seed=0, text=True):
    """A LoRA of random weights on a linear layer, a convolution and perhaps a text encoder, as a file."""
    tensors = {}
    for path in (LINEAR, CONV):
        out, into, *kernel = state[f"{path}.weight"].shape
        tensors[f"unet.{path}.lora_A.weight"] = random(rank, into, *kernel, seed=seed)
        tensors[f"unet.{path}.lora_B.weight"] = random(out, rank, *[1] * len(kernel), seed=seed)
    if text:
        tensors |= {f"{TEXT}.lora_A.weight": random(rank, 32, seed=seed), f"{TEXT}.lora_B.weight": random(32, rank)}
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def done(*arguments):
    result = distill("lora", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    result = distill("lora", *arguments)
    assert result.exit_code == 2, result.output
    return said(result.stderr)


def products(file):
    """Path of each module -> the change of its weight by a LoRA's file, in diffusers' names, at its scale."""
    with safe_open(file, framework="pt") as opened:
        about = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        state = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 - no mapping
    found = {}
    for name in (name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")):
        part, _, path = name.partition(".")
        down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        alpha = about.get(f"{part}.alpha_pattern", {}).get(path, about.get(f"{part}.lora_alpha", len(down)))
        found[name.replace("text_model.", "")] = (
            alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        )
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model; two LoRAs on it; the model with the first at 0.7 and the second at -1 in its weights."""
    root = tmp_path_factory.mktemp("lora")
    model = write_tiny_sdxl(root / "model")
    one = lora_on(unet(model), root, name="one")
    other = lora_on(unet(model), root, name="other", rank=2, seed=1, text=False)
    out = done("merge", model, one, other, "--weight", 0.7, "--weight", -1, "--output", root / "merged")
    return SimpleNamespace(root=root, model=model, one=one, other=other, merged=root / "merged", said=out)


# -- merge ------------------------------------------------------------------------------------------------------------


def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"width": EDGE, "height": EDGE, "num_inference_steps": 2, "guidance_scale": 0.0}
    return pipeline("a red fox", generator=generator, output_type="pt", **size).images


def test_a_merged_model_is_what_peft_fuses_and_makes_the_same_image(made):
    from diffusers import StableDiffusionXLPipeline

    assert made.said.strip() == f"{made.merged}: {made.model} with 2 LoRAs in its weights, float32"
    pipeline = StableDiffusionXLPipeline.from_pretrained(made.model)
    without = images(pipeline)
    for file, weight in ((made.one, 0.7), (made.other, -1.0)):
        pipeline.load_lora_weights(file, adapter_name="one")
        pipeline.set_adapters(["one"], [weight])
        pipeline.fuse_lora(components=["unet", "text_encoder"])
        pipeline.unload_lora_weights()
    loaded = StableDiffusionXLPipeline.from_pretrained(made.merged)
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        fused = getattr(pipeline, part).state_dict()
        assert all(torch.equal(value, fused[name]) for name, value in getattr(loaded, part).state_dict().items()), part
    assert torch.equal(images(loaded), images(pipeline))
    assert (images(loaded) - without).abs().max() > 1e-3


def test_a_merged_model_has_the_type_that_is_asked_for(made, tmp_path):
    done("merge", made.model, made.one, "--output", tmp_path / "half", "--dtype", "float16")
    state, wide = unet(tmp_path / "half"), unet(made.model)
    change = products(made.one)[f"unet.{LINEAR}"]
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert torch.equal(state["conv_in.weight"], wide["conv_in.weight"].half())
    torch.testing.assert_close(state[f"{LINEAR}.weight"], (wide[f"{LINEAR}.weight"] + change).half())


def test_loras_merged_as_one_are_their_weighted_sum(made, tmp_path):
    arguments = ("merge", made.model, made.one, made.other, "--weight", 0.7, "--weight", -1, "--as-lora")
    out = done(*arguments, "--output", tmp_path)
    assert "3 layers of ranks 3 to 5 keep 100.00% of the norm of their sum" in out
    ours, one, other = products(tmp_path / "pytorch_lora_weights.safetensors"), products(made.one), products(made.other)
    assert ours.keys() == one.keys()
    for name, change in ours.items():
        torch.testing.assert_close(change, 0.7 * one[name] - other.get(name, torch.zeros(())), rtol=1e-5, atol=1e-6)
    done("merge", made.model, tmp_path, "--output", tmp_path / "model")
    again, merged = unet(tmp_path / "model"), unet(made.merged)
    assert all(torch.allclose(value, merged[name], rtol=0, atol=1e-6) for name, value in again.items())
    out = done(*arguments, "--output", tmp_path / "small.safetensors", "--rank", 4)
    assert "3 layers of rank 4" in out
    small = products(tmp_path / "small.safetensors")
    for name, change in ours.items():
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        expected = (u[:, :4] * s[:4]) @ v[:4]
        torch.testing.assert_close(small[name].flatten(1), expected, rtol=1e-4, atol=1e-5)


# -- extract ----------------------------------------------------------------------------------------------------------


def test_the_difference_of_a_model_and_loras_in_it_is_their_product(made, tmp_path):
    out = done("extract", made.model, made.merged, "--rank", 5, "--output", tmp_path / "turbo.safetensors")
    assert "layers of rank 5 keep 100.00% of the norm of the difference" in out
    found, base, tuned = products(tmp_path / "turbo.safetensors"), unet(made.model), unet(made.merged)
    for name, change in found.items():
        weight = f"{name.removeprefix('unet.')}.weight"
        torch.testing.assert_close(change, tuned[weight] - base[weight], rtol=1e-4, atol=1e-6)
    assert found[f"unet.{CONV}"].abs().max() > 0.01
    differs = "left out: text_encoder differs by "
    assert differs in out
    assert "left out: text_encoder_2" not in out
    assert "% of its norm, which is not in the LoRA" in out


def test_what_no_lora_of_the_rank_can_hold_is_said(made, tmp_path):
    tuned = write_tiny_sdxl(tmp_path / "tuned")
    file, state = next((tuned / "unet").glob("*.safetensors")), unet(made.model)
    change, bias = random(*state[f"{LINEAR}.weight"].shape), random(*state["conv_norm_out.bias"].shape)
    state[f"{LINEAR}.weight"] += change
    state["conv_norm_out.bias"] += bias
    save_file(state, file, metadata={"format": "pt"})
    out = done("extract", made.model, tuned, "--rank", 8, "--output", tmp_path / "a.safetensors")
    s = torch.linalg.svdvals(change)
    assert f"keep {float(s[:8].norm() / s.norm()):.2%} of the norm" in out
    share = float(bias.norm() / torch.cat([change.flatten(), bias]).norm())
    assert f"left out: 1 tensors of the denoiser that differ ({share:.1%} of the norm): conv_norm_out.bias" in out
    out = done("extract", made.model, tuned, "--energy", 0.9, "--output", tmp_path / "b.safetensors")
    rank = int((s.double().square().cumsum(0) < 0.9 * s.double().square().sum()).sum()) + 1
    assert f"layers of ranks 1 to {rank} keep" in out
    u, _, v = torch.linalg.svd(change)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(products(tmp_path / "b.safetensors")[f"unet.{LINEAR}"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_an_extracted_lora_makes_the_tuned_models_denoiser(made, tmp_path, form):
    file = tmp_path / "lora.safetensors"
    done("extract", made.model, made.merged, "--rank", 5, "--output", file, "--format", form, "--dtype", "float32")
    family = SDXL(SDXL.Config(), ModelSettings(str(made.model), teacher_lora=((str(file), 1.0),)))
    family.check_source()
    state, tuned = family.load_network().state_dict(), unet(made.merged)
    assert all(torch.allclose(state[name], value, rtol=0, atol=1e-6) for name, value in tuned.items())
    names = list(load_file(file))
    assert all(name.startswith("lora_unet_" if form == "kohya" else "unet.") for name in names)


def test_a_run_starts_from_an_extracted_difference(made, tmp_path):
    """At a learning rate of nothing the student is the tuned model; an ordinary one trains every layer from there."""
    file = tmp_path / "turbo.safetensors"
    done("extract", made.model, made.merged, "--rank", 5, "--output", file)
    quiet = {"validation_step_interval": 0, "report_to": "none", "max_train_steps": 3, "checkpoint_step_interval": 0}
    shape = {"lora_rank": 5, "lora_alpha": 5, "init_lora": str(file), "model": made.model}
    students = {}
    for name, rate in (("still", 1e-12), ("moved", 1e-3)):
        execute(write_run(tmp_path, output=name, learning_rate=rate, **shape, **quiet))
        students[name] = products(tmp_path / name / "student" / "pytorch_lora_weights.safetensors")
    start = products(file)
    for path, change in start.items():
        torch.testing.assert_close(students["still"][path], change, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(students["moved"][path], change, rtol=1e-4, atol=1e-6), path


# -- resize -----------------------------------------------------------------------------------------------------------


def test_a_lora_of_its_own_rank_is_the_same_and_a_smaller_one_the_nearest(made, tmp_path):
    own = products(made.one)
    for rank in (3, 2, 7):
        out = done("resize", made.one, "--rank", rank, "--output", tmp_path / f"{rank}.safetensors")
        found = products(tmp_path / f"{rank}.safetensors")
        assert found.keys() == own.keys()
        assert f"3 layers of rank {rank} keep {'100.00%' if rank > 2 else ''}" in out
        for name, change in own.items():
            u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
            expected = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(change.shape) if rank < 3 else change
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    state = load_file(tmp_path / "7.safetensors")
    assert all(value.flatten(1).norm(dim=1).min() > 0.3 for name, value in state.items() if "lora_A" in name)


def test_alphas_and_rank_stabilised_scales_are_folded_in(made, tmp_path):
    state = {name: value for name, value in load_file(made.one).items() if LINEAR in name}
    down, up = state[f"unet.{LINEAR}.lora_A.weight"], state[f"unet.{LINEAR}.lora_B.weight"]
    stem = f"lora_unet_{LINEAR.replace('.', '_')}"
    kohya = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.5)}
    about = {"ss_network_dim": "3", "ss_network_alpha": "1.5"}
    save_file(kohya, tmp_path / "kohya.safetensors", metadata=about)
    done("resize", tmp_path / "kohya.safetensors", "--rank", 2, "--output", tmp_path / "k2.safetensors")
    found = load_file(tmp_path / "k2.safetensors")
    assert float(found[f"{stem}.alpha"]) == 2
    u, s, v = torch.linalg.svd(0.5 * up @ down)
    product = found[f"{stem}.lora_up.weight"] @ found[f"{stem}.lora_down.weight"]
    torch.testing.assert_close(product, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-6)
    with safe_open(tmp_path / "k2.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"ss_network_dim": "2", "ss_network_alpha": "2"}
    settings = {"unet.r": 3, "unet.lora_alpha": 6, "unet.use_rslora": True}
    save_file(state, tmp_path / "rs.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    done("resize", tmp_path / "rs.safetensors", "--rank", 3, "--output", tmp_path / "r3.safetensors")
    torch.testing.assert_close(products(tmp_path / "r3.safetensors")[f"unet.{LINEAR}"], 6 / 3**0.5 * up @ down)
    with safe_open(tmp_path / "r3.safetensors", framework="pt") as opened:
        written = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (written["unet.r"], written["unet.lora_alpha"], written["unet.use_rslora"]) == (3, 3, False)


def test_factors_are_decomposed_as_their_product_is():
    up, down = random(40, 6), random(6, 8, 3, 3)
    one, other = nearest_product(up, down, LowRank(4)), nearest((up @ down.flatten(1)).reshape(40, 8, 3, 3), LowRank(4))
    assert (one.down.shape, one.up.shape) == ((4, 8, 3, 3), (40, 4, 1, 1))
    torch.testing.assert_close(one.up.flatten(1) @ one.down.flatten(1), other.up.flatten(1) @ other.down.flatten(1))
    assert one.kept == pytest.approx(other.kept, rel=1e-5)
    assert one.total == pytest.approx(float((up @ down.flatten(1)).square().sum()), rel=1e-5)
    assert nearest(torch.zeros(4, 5), LowRank(energy=0.9)).rank == 1


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_the_remedy(made, tmp_path):
    out = ("--output", tmp_path / "x.safetensors")
    message = refused("extract", made.model, made.model, *out)
    assert "there is no difference" in message
    assert "name the base first" in message
    assert "does not exist" in refused("extract", made.model, "./nowhere", *out)
    smaller = write_tiny_sdxl(tmp_path / "smaller")
    config = json.loads((smaller / "unet" / "config.json").read_text())
    config["cross_attention_dim"] = 64
    (smaller / "unet" / "config.json").write_text(json.dumps(config))
    assert "the weights are not those that its config describes" in refused("extract", made.model, smaller, *out)
    assert "say how much is kept: --rank 32" in refused("resize", made.one, *out)
    assert "--energy 1.5 is no share" in refused("resize", made.one, "--energy", 1.5, *out)
    assert "give it once for all" in refused(
        "merge", made.model, made.one, made.other, made.one, "--weight", 1, "--weight", 2, *out, "--as-lora"
    )
    assert "add --as-lora, or leave --rank out" in refused("merge", made.model, made.one, "--rank", 3, *out)
    assert "a whole model is a folder" in refused("merge", made.model, made.one, *out)
    assert "did you mean 'float16'" in refused("extract", made.model, made.merged, *out, "--dtype", "fload16")
    assert "--family sdx is not a registered family" in refused(
        "resize", made.one, "--rank", 2, "--family", "sdx", *out
    )
    save_file({f"unet.{LINEAR}.hada_w1_a": random(4, 4)}, tmp_path / "loha.safetensors")
    message = refused("resize", tmp_path / "loha.safetensors", "--rank", 2, *out)
    assert "is of the kind LoHa, which has no rank that can be changed" in message
    assert "kohya's format is written for the denoiser alone" in refused(
        "merge", made.model, made.one, made.other, "--as-lora", "--format", "kohya", *out
    )
    assert not (tmp_path / "x.safetensors").exists()
    lora_on(unet(made.model), tmp_path, name="x")
    assert "is there already name another, or add --overwrite" in refused("resize", made.one, "--rank", 2, *out)
    done("resize", made.one, "--rank", 2, *out, "--overwrite")


def test_a_dora_is_no_summand_but_can_be_merged(made, tmp_path):
    state = {name: value for name, value in load_file(made.one).items() if LINEAR in name}
    out = state[f"unet.{LINEAR}.lora_B.weight"].shape[0]
    save_file({**state, f"unet.{LINEAR}.lora_magnitude_vector": random(out) + 1}, tmp_path / "dora.safetensors")
    arguments = ("merge", made.model, tmp_path / "dora.safetensors", made.other)
    assert "leave --as-lora out" in refused(*arguments, "--as-lora", "--output", tmp_path / "sum.safetensors")
    assert "is of the kind DoRA" in refused(
        "resize", tmp_path / "dora.safetensors", "--rank", 2, "--output", tmp_path / "sum.safetensors"
    )


def test_a_family_without_the_tools_says_so():
    class Plain(LoraTools):
        name = "plain"

    from distill.core.errors import UserError

    for call in (lambda: Plain().extract_lora(Plain(), None, LowRank(1)), lambda: Plain.resize_lora("a", None, None)):
        with pytest.raises(UserError, match="the family plain has no tools for files of LoRAs"):
            call()
    assert LoraReport(1, (1, 1), 1.0).left_out == ()
