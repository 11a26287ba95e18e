"""LoRAs and their kin on files that people bring: applied exactly and whole, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExtraLora, ModelSettings
from distill.model_families.loras.lora_kinds import AdapterLayer, changed_weight, split
from distill.model_families.sdxl import SDXL
from safetensors.torch import save_file
from support.tiny_families import MODELS
from support.tiny_sdxl import write_tiny_sdxl

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
NORM = "down_blocks.1.attentions.0.transformer_blocks.0.norm1"
TEXT = "text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


def make(source, *loras, **settings):
    return SDXL(SDXL.Config(), ModelSettings(source=str(source), teacher_lora=tuple(loras), **settings))


@pytest.fixture(scope="module")
def base(tiny):
    return make(tiny).load_network().state_dict()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) * 0.3


def kohya(path, prefix="lora_unet"):
    return f"{prefix}_{path.replace('.', '_')}"


def write(folder, tensors, *, name="lora.safetensors", metadata=None):
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata=metadata)
    return str(folder / name)


def fused(tiny, file, weight=1.0, **settings):
    family = make(tiny, (file, weight), **settings)
    family.check_source()
    return family.load_network().state_dict()


def refusal(family):
    with pytest.raises(UserError) as caught:
        family.check_source()
    return str(caught.value)


def sized(base, path):
    """(outputs, inputs, kernel...) of a layer."""
    return base[f"{path}.weight"].shape


# -- what each kind does, element by element --------------------------------------------------------------------------


def entries(base, path, kind):
    """The tensors of one layer of a kind, and its change of the weight, written as sums."""
    out, into, *kernel = sized(base, path)
    r, alpha = 3, 2.0
    a1, b1, a2, b2 = random(out, r), random(r, into), random(out, r, seed=1), random(r, into, seed=1)
    if kind == "LoRA with a middle":
        middle = random(r, r, *kernel)
        change = sum(
            torch.einsum("o,i,hw->oihw", a1[:, p], b1[q], middle[p, q]) for p in range(r) for q in range(r)
        ) * (alpha / r)
        ones = [1] * len(kernel)
        tensors = {"lora_up.weight": a1.view(out, r, *ones), "lora_down.weight": b1.view(r, into, *ones)}
        return {**tensors, "lora_mid.weight": middle, "alpha": torch.tensor(alpha)}, change
    if kind == "LoHa":
        change = torch.stack([(a1[o] @ b1) * (a2[o] @ b2) for o in range(out)]) * (alpha / r)
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return {**dict(zip(names, (a1, b1, a2, b2), strict=True)), "alpha": torch.tensor(alpha)}, change
    if kind == "LoKr":
        first, second = random(4, 4), random(out // 4, into // 4)
        rows = [torch.cat([first[i, j] * second for j in range(4)], dim=1) for i in range(4)]
        return {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(99.0)}, torch.cat(rows)
    if kind == "LoKr of a product":
        first, left, right = random(4, 4), random(out // 4, r), random(r, into // 4)
        rows = [torch.cat([first[i, j] * (left @ right) for j in range(4)], dim=1) for i in range(4)]
        tensors = {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(alpha)}
        return tensors, torch.cat(rows) * (alpha / r)
    if kind == "differences":
        change = random(out, into, *kernel)
        return {"diff": change}, change
    assert kind == "scalar"
    tensors = {"lora_up.weight": a1, "lora_down.weight": b1, "alpha": torch.tensor(alpha), "scalar": torch.tensor(0.5)}
    return tensors, a1 @ b1 * (alpha / r) * 0.5


CASES = [("LoRA with a middle", CONV), ("differences", CONV)]
CASES += [(kind, LINEAR) for kind in ("LoHa", "LoKr", "LoKr of a product", "differences", "scalar")]


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_kinds_that_diffusers_cannot_read_are_fused_exactly(tiny, base, tmp_path, kind, path):
    tensors, change = entries(base, path, kind)
    file = write(tmp_path, {f"{kohya(path)}.{leaf}": tensor for leaf, tensor in tensors.items()})
    ours = fused(tiny, file, 0.7)
    expected = base[f"{path}.weight"] + 0.7 * change
    torch.testing.assert_close(ours[f"{path}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert (change.abs() > 0.01).any()
    assert all(torch.equal(ours[key], base[key]) for key in base if key != f"{path}.weight")


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_a_dora_in_kohyas_naming_is_no_plain_lora(tiny, base, tmp_path, axis):
    weight = base[f"{LINEAR}.weight"]
    out, into = weight.shape
    up, down = random(out, 4), random(4, into)
    magnitude = (random(out, 1) if axis == "outputs" else random(1, into)).abs() + 0.5
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0), "dora_scale": magnitude}
    file = write(tmp_path, {f"{kohya(LINEAR)}.{leaf}": tensor for leaf, tensor in tensors.items()})
    directed = weight + 0.5 * up @ down
    norm = directed.norm(dim=1 if axis == "outputs" else 0, keepdim=True)
    torch.testing.assert_close(fused(tiny, file)[f"{LINEAR}.weight"], magnitude * directed / norm)


def test_the_same_dora_in_both_namings_is_the_same_teacher(tiny, base, tmp_path):
    out, into = sized(base, LINEAR)
    up, down, magnitude = random(out, 4), random(4, into), random(out).abs() + 0.5
    ours = {
        "lora_up.weight": up,
        "lora_down.weight": down,
        "alpha": torch.tensor(4.0),
        "dora_scale": magnitude[:, None],
    }
    peft = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
    one = write(tmp_path, {f"{kohya(LINEAR)}.{leaf}": tensor for leaf, tensor in ours.items()}, name="a.safetensors")
    other = write(tmp_path, {f"unet.{LINEAR}.{leaf}": tensor for leaf, tensor in peft.items()}, name="b.safetensors")
    key = f"{LINEAR}.weight"
    torch.testing.assert_close(fused(tiny, one)[key], fused(tiny, other)[key], rtol=0, atol=1e-6)


def test_trained_norms_change_weight_and_bias(tiny, base, tmp_path):
    weight, bias = random(*sized(base, NORM)), random(*sized(base, NORM), seed=1)
    file = write(tmp_path, {f"{kohya(NORM)}.w_norm": weight, f"{kohya(NORM)}.b_norm": bias})
    ours = fused(tiny, file)
    torch.testing.assert_close(ours[f"{NORM}.weight"], base[f"{NORM}.weight"] + weight)
    torch.testing.assert_close(ours[f"{NORM}.bias"], base[f"{NORM}.bias"] + bias)


def test_text_encoders_are_fused_by_their_number(tiny, tmp_path):
    plain = make(tiny)._text_encoders().encoders
    state = plain["text_encoder_2"].state_dict()
    key = next(name for name in state if name.endswith("layers.0.mlp.fc1.weight"))
    change = random(*state[key].shape)
    file = write(tmp_path, {f"{kohya(TEXT, 'lora_te2')}.diff": change})
    family = make(tiny, (file, 1.0))
    family.check_source()
    ours = family._text_encoders().encoders
    torch.testing.assert_close(ours["text_encoder_2"].state_dict()[key], state[key] + change)
    first = plain["text_encoder"].state_dict()
    assert all(torch.equal(value, first[name]) for name, value in ours["text_encoder"].state_dict().items())


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stem", [f"unet.{LINEAR}", kohya(LINEAR), f"diffusion_model.{LINEAR}", kohya(LINEAR, "lycoris"), LINEAR]
)
def test_every_naming_of_a_layer_is_found(tiny, base, tmp_path, stem):
    change = random(*sized(base, LINEAR))
    ours = fused(tiny, write(tmp_path, {f"{stem}.diff": change}))
    torch.testing.assert_close(ours[f"{LINEAR}.weight"], base[f"{LINEAR}.weight"] + change)


@pytest.mark.parametrize("prefix", ["lora_unet_{}", "diffusion_model.{}"])
def test_the_original_codes_fused_layer_changes_its_three_modules(tmp_path, prefix):
    """FLUX.1's qkv, in a kind that diffusers does not read."""
    flux = MODELS["flux-dev"]
    folder = flux.write(tmp_path / "model")
    before = flux.make(folder).load_network().state_dict()
    names = [f"transformer_blocks.0.attn.to_{one}.weight" for one in "qkv"]
    change = random(sum(len(before[name]) for name in names), before[names[0]].shape[1])
    inner = "double_blocks.0.img_attn.qkv"
    stem = prefix.format(inner if "." in prefix else inner.replace(".", "_"))
    family = flux.make(folder, teacher_lora=((write(tmp_path, {f"{stem}.diff": change}), 1.0),))
    family.check_source()
    after = family.load_network().state_dict()
    for name, piece in zip(names, change.split([len(before[name]) for name in names]), strict=True):
        torch.testing.assert_close(after[name], before[name] + piece)


def test_layers_of_t5_are_named_as_left_out(tmp_path):
    flux = MODELS["flux-dev"]
    folder = flux.write(tmp_path / "model")
    file = write(
        tmp_path,
        {
            "lora_unet_double_blocks_0_img_mlp_2.diff": random(*flux.make(folder).load_network().state_dict()[
                "transformer_blocks.0.ff.net.2.weight"
            ].shape),
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q.diff": random(4, 4),
        },
    )  # fmt: skip
    message = refusal(flux.make(folder, teacher_lora=((file, 1.0),)))
    assert "of its 2 layers 1 have no place in it (lora_te2_encoder_block_0_layer_0_SelfAttention_q)" in message


def written(tmp_path, names):
    """One LoRA in every naming, on the layers of `names` (diffusers' path -> sizes), at a scale of 3."""
    whole, flat, dotted = {}, {}, {"base_model.model": {}, "diffusion_model": {}}
    for number, (path, (component, out, into)) in enumerate(names.items()):
        up, down = random(out, 4, seed=number), random(4, into, seed=number)
        whole |= {f"{component}.{path}.lora_A.weight": down, f"{component}.{path}.lora_B.weight": 3 * up}
        leaves = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(12.0)}
        flat |= {f"{kohya(path)}.{leaf}": tensor for leaf, tensor in leaves.items()}
        for prefix, found in dotted.items():
            found |= {f"{prefix}.{path}.lora_A.weight": down, f"{prefix}.{path}.lora_B.weight": 3 * up}
    files = {"diffusers": whole, "sd-scripts": flat, **dotted}
    return {name: write(tmp_path, tensors, name=f"{name}.safetensors") for name, tensors in files.items()}


@pytest.mark.parametrize("name", ["sd1x", "flux-dev", "sd3"])
def test_one_lora_in_every_naming_is_the_same_teacher_and_the_same_adapter(name, tmp_path):
    model = MODELS[name]
    folder = model.write(tmp_path / "model")
    family = model.make(folder)
    network, component = family.load_network(), family.architecture.denoiser
    inside = "attn1." if component == "unet" else "attn."
    linear = {path: one for path, one in network.named_modules() if f"{inside}to_" in path and hasattr(one, "weight")}
    sizes = {path: (component, *one.weight.shape) for path, one in linear.items()}
    results = {}
    for naming, file in written(tmp_path, sizes).items():
        teacher = model.make(folder, teacher_lora=((file, 1.0),))
        teacher.check_source()
        fused, beside = teacher.load_network().state_dict(), family.load_network()
        family.attach_adapter(beside, file, "own")
        change = {path: beside.get_submodule(path).get_delta_weight("own") for path in sizes}
        results[naming] = ({path: fused[f"{path}.weight"] for path in sizes}, change)
    expected = results.pop("diffusers")
    assert len(sizes) > 3
    for ours in results.values():
        for path in sizes:
            torch.testing.assert_close(ours[0][path], expected[0][path], rtol=0, atol=1e-6)
            torch.testing.assert_close(ours[1][path], expected[1][path], rtol=0, atol=1e-6)


# -- what is refused --------------------------------------------------------------------------------------------------


def plain_layer(base, path, stem=None):
    out, into = sized(base, path)
    stem = stem or kohya(path)
    tensors = {"lora_up.weight": random(out, 4), "lora_down.weight": random(4, into), "alpha": torch.tensor(4.0)}
    return {f"{stem}.{leaf}": tensor for leaf, tensor in tensors.items()}


def partly(base):
    foreign = "lora_unet_down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q"
    return plain_layer(base, LINEAR) | plain_layer(base, LINEAR, foreign)


def test_a_lora_that_fits_in_part_is_refused_with_the_number(tiny, base, tmp_path):
    file = write(tmp_path, partly(base))
    message = refusal(make(tiny, (file, 1.0)))
    assert "of its 2 layers 1 have no place in it (lora_unet_down_blocks_7" in message
    assert "strict: false on its entry under teacher_lora applies the 1 that fit" in message
    assert "1 have no place in it" in refusal(make(tiny, init_lora=file))


def test_what_fits_is_applied_where_it_is_asked_for(tiny, base, tmp_path, caplog):
    file = write(tmp_path, partly(base))
    with caplog.at_level("WARNING"):
        ours = fused(tiny, file, partial_loras=(file,))
    assert "applied in part, as strict is false: 1 of 2 layers; left out: lora_unet_down_blocks_7" in caplog.text
    whole = fused(tiny, write(tmp_path, plain_layer(base, LINEAR), name="whole.safetensors"))
    torch.testing.assert_close(ours[f"{LINEAR}.weight"], whole[f"{LINEAR}.weight"])


def test_alpha_of_diffusers_metadata_counts_where_a_part_is_applied(tiny, base, tmp_path):
    out, into = sized(base, LINEAR)
    up, down = random(out, 4), random(4, into)
    tensors = {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}
    tensors |= {f"unet.gone.{one}.weight": torch.zeros(4, 4) for one in ("lora_A", "lora_B")}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 12, "unet.r": 4})}
    file = write(tmp_path, tensors, metadata=metadata)
    ours = fused(tiny, file, partial_loras=(file,))
    torch.testing.assert_close(ours[f"{LINEAR}.weight"], base[f"{LINEAR}.weight"] + 3 * up @ down)


def test_one_layer_of_another_size_is_named(tiny, base, tmp_path):
    wrong = {f"{kohya(CONV)}.lora_up.weight": torch.zeros(9, 4), f"{kohya(CONV)}.lora_down.weight": torch.zeros(4, 9)}
    message = refusal(make(tiny, (write(tmp_path, plain_layer(base, LINEAR) | wrong), 1.0)))
    assert "of its 2 layers 1 have no place in it" in message
    assert "changes (9, 9)" in message


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        (["oft_blocks", "alpha"], "of the kind OFT"),
        (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], "of the kind GLoRA"),
        (["weight", "on_input"], "IA3"),
        (["lora_up.weight", "lora_down.weight", "lora_up.bias"], "biases of a LoRA"),
    ],
)
def test_kinds_that_are_not_computed_are_refused_by_name(tiny, tmp_path, leaves, words):
    file = write(tmp_path, {f"{kohya(LINEAR)}.{leaf}": torch.zeros(4, 4) for leaf in leaves})
    message = refusal(make(tiny, (file, 1.0)))
    assert words in message
    assert "merge it into the model" in message


def test_trained_tokens_in_a_lora_are_refused_or_left_out(tiny, base, tmp_path):
    file = write(tmp_path, plain_layer(base, LINEAR) | {"bundle_emb.cat.clip_l": torch.zeros(2, 8)})
    assert "comes with trained tokens, which are not read (bundle_emb.cat.clip_l)" in refusal(make(tiny, (file, 1.0)))
    alone = write(tmp_path, plain_layer(base, LINEAR), name="alone.safetensors")
    key = f"{LINEAR}.weight"
    torch.testing.assert_close(fused(tiny, file, partial_loras=(file,))[key], fused(tiny, alone)[key])


def test_kinds_beside_a_student_are_refused_with_the_way_out(tiny, base, tmp_path):
    tensors, _ = entries(base, LINEAR, "LoHa")
    file = write(tmp_path, {f"{kohya(LINEAR)}.{leaf}": tensor for leaf, tensor in tensors.items()})
    message = refusal(make(tiny, init_lora=file))
    assert "is of the kind LoHa, which can be fused into the teacher but not used beside a student" in message
    student = write(tmp_path, plain_layer(base, LINEAR), name="pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="LoHa"):
        make(tiny).load_student(tmp_path, extra_loras=[ExtraLora(file)])
    assert make(tiny).loras.plain(student).num_layers("unet") == 1


def test_files_that_are_crafted_are_refused(tiny, base, tmp_path):
    layer = plain_layer(base, LINEAR)
    stem, out, into = kohya(LINEAR), *sized(base, LINEAR)
    empty = {f"{stem}.lora_up.weight": torch.zeros(out, 0), f"{stem}.lora_down.weight": torch.zeros(0, into)}
    crafted = {
        "has a rank of 0": empty,
        "more than one alpha": layer | {f"{stem}.alpha": torch.ones(2)},
        "lacks one of its two factors": {f"{stem}.lora_up.weight": torch.zeros(out, 4)},
        "it is an embedding": {"emb_params": torch.zeros(2, 8)},
        "holds nothing for an SDXL (its first tensor is None)": {},
    }
    for words, tensors in crafted.items():
        assert words in refusal(make(tiny, (write(tmp_path, tensors), 1.0)))
    file = write(tmp_path, partly(base), metadata={"lora_adapter_metadata": "[1"})
    with pytest.raises(UserError, match="is no JSON object"):
        fused(tiny, file, partial_loras=(file,))


def test_values_that_are_not_finite_are_refused(tiny, base, tmp_path):
    layer = plain_layer(base, LINEAR)
    layer[f"{kohya(LINEAR)}.lora_up.weight"][0, 0] = float("nan")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        make(tiny, (write(tmp_path, layer), 1.0)).load_network()


def test_the_header_alone_decides(tiny, base, tmp_path, monkeypatch):
    file = write(tmp_path, plain_layer(base, LINEAR))
    monkeypatch.setattr(
        "distill.model_families.files.weights.WeightFile.read_one", lambda *_: pytest.fail("read a tensor")
    )
    make(tiny, (file, 1.0)).check_source()


def test_names_are_split_into_layers_and_endings():
    layers, tokens, unknown = split(
        [
            "unet.a.lora_A.weight",
            "unet.a.lora_B.default.weight",
            "x.to_q_lora.down.weight",
            "te.alpha",
            "emb_params",
            "b",
        ]
    )
    assert layers == {
        "unet.a": {"lora_A.weight": "unet.a.lora_A.weight", "lora_B.default.weight": "unet.a.lora_B.default.weight"},
        "x": {"to_q_lora.down.weight": "x.to_q_lora.down.weight"},
        "te": {"alpha": "te.alpha"},
    }
    assert (tokens, unknown) == (["emb_params"], ["b"])


def test_a_rank_stabilised_scale_is_alpha_over_the_root_of_the_rank():
    layer = AdapterLayer(
        "x", {"lora_A.weight": torch.eye(4), "lora_B.weight": torch.eye(4)}, alpha=6.0, rank_stabilised=True
    )
    torch.testing.assert_close(changed_weight(layer, torch.zeros(4, 4), strength=1.0), 3 * torch.eye(4))
