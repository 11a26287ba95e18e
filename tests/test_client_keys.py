"""Our LoRA files in ComfyUI: every key is found by its rules, at the published sizes, and changes what it must."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from distill.core.errors import UserError
from distill.model_families.comfyui import kohya, kohya_kolors, kohya_qwen_image, kohya_z_image
from distill.model_families.files.architecture import DIFFUSERS, Layer
from distill.model_families.loras.plain_lora import Lora, read_by_diffusers
from safetensors.torch import save_file
from support.comfyui_keys import placed
from support.published import PUBLISHED, linear_layers

MODELS = pytest.mark.parametrize("name", PUBLISHED)
ALPHA = 3.0


def empty_network(model, **changes):
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, model.network)(**{**model.config, **changes})


def layers_of(network, make, *, rank=1):
    """A layer of a LoRA for each module of a network; `make` makes a tensor of a shape."""
    return {
        path: Layer(
            make(rank, *module.weight.shape[1:]), make(len(module.weight), rank, *[1] * (module.weight.ndim - 2)), ALPHA
        )
        for path, module in linear_layers(network).items()
    }


def on_meta(*shape):
    return torch.empty(*shape, device="meta")


def held(model, layers):
    return {path: layer for path, layer in layers.items() if not re.fullmatch(model.unheld, path)}


def exported(model, layers, config):
    """The tensors of our file, as the exporter writes them."""
    layers = {path: kohya.at_scale_one(layer) for path, layer in layers.items()}
    return kohya.tensors(model.kohya.renamed(layers, config), torch.float32, model.kohya.names)


def fits(tensor, place, kind):
    """Whether ComfyUI can apply a tensor where it puts it."""
    if kind == "alpha":
        return tensor.ndim == 0
    return len(tensor) == place.rows if kind == "up" else tensor.shape[1:].numel() == place.shape[1]


# -- names, at the published sizes ------------------------------------------------------------------------------------


@MODELS
def test_comfyui_finds_every_key_of_our_file(name):
    """With the rows and columns that the layer there has; and every row of an adapted layer is changed once."""
    model = PUBLISHED[name]
    network = empty_network(model)
    layers = held(model, layers_of(network, on_meta))
    assert len(layers) == model.layers
    plain = {path: Layer(layer.down, layer.up, 1.0) for path, layer in layers.items()}
    state = kohya.tensors(model.kohya.renamed(plain, network.config), torch.float32, model.kohya.names)
    names = model.client.names(model.sizes)
    found = {key: placed(names, key) for key in state}
    assert [key for key, (place, _) in found.items() if place is None] == []
    assert [key for key, (place, kind) in found.items() if not fits(state[key], place, kind)] == []
    rows = [(place.layer, place.start + row) for place, kind in found.values() if kind == "up"
            for row in (0, place.rows - 1)]  # fmt: skip
    changed = sum(place.rows for place, kind in found.values() if kind == "up")
    assert changed == sum(len(layer.up) for layer in layers.values())
    assert len(set(rows)) == len(rows)


@MODELS
def test_what_comfyui_finds_in_a_students_own_file(name):
    """The file of ``student/``, in diffusers' names."""
    model = PUBLISHED[name]
    own = kohya.tensors(layers_of(empty_network(model), on_meta), torch.float32, DIFFUSERS)
    names = model.client.names(model.sizes)
    assert sum(placed(names, key)[0] is not None for key in own) == 2 * model.own


def test_kolors_modules_are_sdxls():
    """So are the names that ComfyUI's nodes for Kolors, which use its SDXL, have for them. Except one, of the text."""
    from diffusers import UNet2DConditionModel
    from distill.model_families.sdxl import SDXL

    sdxl = {
        "in_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    text = {
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": 5632,
    }
    with torch.device("meta"):
        networks = [UNet2DConditionModel(**sdxl), UNet2DConditionModel(**{**sdxl, **text})]
    ours, theirs = (linear_layers(network) for network in networks)
    assert theirs.keys() - ours.keys() == {"encoder_hid_proj"}
    form = SDXL.architecture.kohya
    assert form is not None
    sdxls = form.renamed(layers_of(networks[0], on_meta), networks[0].config)
    layers = {path: one for path, one in layers_of(networks[1], on_meta).items() if path != "encoder_hid_proj"}
    assert len(sdxls) == 794
    assert kohya_kolors.KOHYA.renamed(layers, networks[1].config).keys() == sdxls.keys()


# -- values, in tiny networks -----------------------------------------------------------------------------------------

TINY = {
    "sd3.5-medium": (
        {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 4, "caption_projection_dim": 8,
         "joint_attention_dim": 6, "pooled_projection_dim": 10, "dual_attention_layers": (0, 1), "in_channels": 4,
         "out_channels": 4},
        {"d": 8, "latent": 16, "text": 6, "pooled": 10, "depth": 3, "dual": (0, 1)},
    ),
    "flux.1-dev": (
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 16,
         "joint_attention_dim": 6, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2)},
        {"d": 8, "latent": 16, "text": 6, "pooled": 10, "depth": 2, "singles": 2, "approximator": 0},
    ),
    "chroma1-hd": (
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 16,
         "joint_attention_dim": 6, "axes_dims_rope": (2, 2), "approximator_layers": 1, "approximator_hidden_dim": 12},
        {"d": 8, "latent": 16, "text": 6, "guide": 12, "depth": 2, "singles": 2, "approximator": 1},
    ),
    "flux.2-dev": (
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 16,
         "joint_attention_dim": 6, "axes_dims_rope": (2, 2)},
        {"d": 8, "latent": 16, "text": 6, "depth": 2, "singles": 2},
    ),
    "z-image": (
        {"dim": 8, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 6,
         "in_channels": 4, "axes_dims": (2, 2), "axes_lens": (4, 4)},
        {"d": 8, "k": 8, "latent": 16, "text": 6, "time": 1024, "step": 8, "f": 21, "depth": 2, "refiners": 2},
    ),
    "auraflow-0.3": (
        {"attention_head_dim": 4, "num_attention_heads": 2, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
         "joint_attention_dim": 6, "caption_projection_dim": 8},
        {"d": 8, "f": 256, "latent": 16, "text": 6, "depth": 2, "singles": 2},
    ),
    "qwen-image": (
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "joint_attention_dim": 6,
         "in_channels": 16, "out_channels": 4, "axes_dims_rope": (2, 2, 2)},
        {"d": 8, "latent": 16, "text": 6, "depth": 2},
    ),
    "lumina-image-2.0": (
        {"num_layers": 1, "num_refiner_layers": 1},
        {**PUBLISHED["lumina-image-2.0"].sizes, "depth": 1, "refiners": 1},
    ),
    "pixart-sigma-1024": (
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "cross_attention_dim": 8,
         "caption_channels": 6},
        {"d": 8, "latent": 16, "text": 6, "depth": 2},
    ),
    "qwen-image-2.1": (
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "context_in_dim": 6, "in_channels": 16,
         "out_channels": 16, "axes_dims_rope": (2, 2)},
        {"d": 8, "latent": 16, "text": 6, "depth": 2},
    ),
}  # fmt: skip
CONVERTERS = {
    "sd3.5-medium": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux.2-dev": "convert_flux2_transformer_checkpoint_to_diffusers",
    "lumina-image-2.0": "convert_lumina2_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "auraflow-0.3": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "qwen-image-2.1": "convert_qwen_image21_transformer_checkpoint_to_diffusers",
}
"""diffusers' readers of checkpoints in the original layout, of those that are right at every width (Lumina's: one)."""
WIDE = {"lumina-image-2.0": r"layers\.0\.attn\..+"}
"""What is adapted where the width is the real one."""


GUIDANCE = "distilled_guidance_layer"
UNMAPPED = {
    f"{GUIDANCE}.in_proj": f"{GUIDANCE}.in_proj",
    f"{GUIDANCE}.out_proj": f"{GUIDANCE}.out_proj",
    f"{GUIDANCE}.layers.0.linear_1": f"{GUIDANCE}.layers.0.in_layer",
    f"{GUIDANCE}.layers.0.linear_2": f"{GUIDANCE}.layers.0.out_layer",
}
"""Chroma's layers for which ComfyUI has no map, as diffusers' converter has them (it is right at one width alone)."""


class Checkpoint(dict):
    """A checkpoint of weights alone; the tensors that a reader asks for besides are zero."""

    def pop(self, key, *default):
        return super().pop(key, *default or (torch.zeros(12),))


def random_layers(network, pattern):
    generator = torch.Generator().manual_seed(0)
    layers = layers_of(network, lambda *shape: torch.randn(*shape, generator=generator), rank=2)
    return {path: layer for path, layer in layers.items() if re.fullmatch(pattern, path)}


def change(layer):
    return layer.alpha / layer.rank * layer.up.flatten(1) @ layer.down.flatten(1)


def exchanged(weight):
    return torch.cat(weight.chunk(2)[::-1])


def applied(names, state):
    """What ComfyUI adds to the weights of its network: alpha / rank * up @ down, on the rows of each name."""
    added = {}
    for key in state:
        place, kind = placed(names, key)
        if kind != "up":
            continue
        down = state[key.replace(".lora_up.", ".lora_down.").replace(".lora_B.", ".lora_A.")]
        alpha = state.get(re.sub(r"lora_(up|B)\.weight", "alpha", key), torch.tensor(float(len(down))))
        patch = alpha / len(down) * state[key].flatten(1) @ down.flatten(1)
        weight = added.setdefault(place.layer, torch.zeros(place.shape))
        weight[place.start : place.start + place.rows] += exchanged(patch) if place.halves_exchanged else patch
    return added


@pytest.mark.parametrize("name", TINY)
def test_comfyui_changes_the_weights_as_the_lora_does(name):
    """By its rules on its own layout: in the rows that it has for diffusers' names, and as diffusers converts them."""
    from diffusers.loaders import single_file_utils

    model, (config, sizes) = PUBLISHED[name], TINY[name]
    network = empty_network(model, **config)
    layers = held(model, random_layers(network, WIDE.get(name, ".+")))
    names = model.client.names(sizes)
    added = applied(names, exported(model, layers, network.config))
    compared = set()
    for path, layer in layers.items():
        place = names.get(f"transformer.{path}")
        if place is not None:
            rows = added[place.layer][place.start : place.start + place.rows]
            torch.testing.assert_close(exchanged(rows) if place.halves_exchanged else rows, change(layer))
            compared.add(path)
    if name in CONVERTERS:
        state = Checkpoint({f"{path}.weight": value for path, value in added.items()})
        weights = getattr(single_file_utils, CONVERTERS[name])(state)
        for path, layer in layers.items():
            torch.testing.assert_close(weights[f"{path}.weight"].flatten(1), change(layer))
            compared.add(path)
    for path in UNMAPPED.keys() & layers.keys():
        torch.testing.assert_close(added[UNMAPPED[path]], change(layers[path]))
        compared.add(path)
    assert compared == layers.keys()


# -- other readers ----------------------------------------------------------------------------------------------------

PIPELINES = {
    "flux.1-dev": "FluxPipeline",
    "flux.2-dev": "Flux2Pipeline",
    "flux.2-klein-4b": "Flux2KleinPipeline",
    "z-image": "ZImagePipeline",
    "auraflow-0.3": "AuraFlowPipeline",
    "qwen-image": "QwenImagePipeline",
    "qwen-image-2.1": "QwenImage21Pipeline",
}
ANY_WIDTH = sorted(PIPELINES.keys() & TINY.keys() - {"flux.1-dev"})
"""FLUX.1's reader takes fused layers apart at the real width alone (test_kohya.py)."""


def architecture(name):
    import diffusers

    return SimpleNamespace(denoiser="transformer", pipeline_class=lambda: getattr(diffusers, PIPELINES[name]))


@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_finds_every_module_of_our_file_but_those_that_are_named(name, tmp_path):
    model = PUBLISHED[name]
    network = empty_network(model)
    layers = held(model, layers_of(network, lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)))
    kohya.write_file(tmp_path / "lora.safetensors", exported_in_half(model, layers, network.config), {})
    found = kohya.readable(tmp_path / "lora.safetensors", architecture(name), network.config)
    assert found <= layers.keys()
    assert layers.keys() - found == set(model.kohya.unread) & layers.keys()


def exported_in_half(model, layers, config):
    plain = {path: Layer(layer.down, layer.up, 1.0) for path, layer in layers.items()}
    return kohya.tensors(model.kohya.renamed(plain, config), torch.bfloat16, model.kohya.names)


@pytest.mark.parametrize("name", ANY_WIDTH)
def test_diffusers_reads_what_was_trained(name, tmp_path):
    model, (config, _) = PUBLISHED[name], TINY[name]
    network = empty_network(model, **config)
    layers = held(model, random_layers(network, ".+"))
    save_file(exported(model, layers, network.config), tmp_path / "lora.safetensors")
    read = read_by_diffusers(str(tmp_path / "lora.safetensors"), 1.0, architecture(name), network.config)
    assert read.alphas is None, "the scale is in the weights"
    for path in layers.keys() - set(model.kohya.unread):
        up, down = (read.state[f"transformer.{path}.lora_{part}.weight"].flatten(1) for part in "BA")
        torch.testing.assert_close(up @ down, change(layers[path]))


@pytest.mark.parametrize("name", ["flux.2-dev", "sd3.5-medium", "lumina-image-2.0", "chroma1-hd"])
def test_our_file_comes_back_whole(name, tmp_path):
    """Also what diffusers leaves out of it: of FLUX.2's, which have fewer layers than modules, the modulations."""
    from distill.model_families.comfyui.original_names import OriginalNames
    from distill.model_families.flux import Flux
    from distill.model_families.loras.lora import read_lora

    model, (config, _) = PUBLISHED[name], TINY[name]
    network = empty_network(model, **config)
    layers = held(model, random_layers(network, WIDE.get(name, ".+")))
    save_file(exported(model, layers, network.config), tmp_path / "lora.safetensors")
    table = model.kohya.renamed.__self__  # type: ignore[attr-defined]
    assert isinstance(table, OriginalNames)
    other = replace(
        Flux.architecture, pipeline=PIPELINES.get(name, "StableDiffusion3Pipeline"), kohya=model.kohya,
        original_path=table.place, swapped=table.swapped,
    )  # fmt: skip
    lora = read_lora(str(tmp_path / "lora.safetensors"), 1.0, other, {"transformer": network}, fused=False)
    assert isinstance(lora, Lora)
    for path, layer in layers.items():
        up, down = (lora.state[f"transformer.{path}.lora_{part}.weight"].flatten(1) for part in "BA")
        torch.testing.assert_close(up @ down, change(layer))


@pytest.mark.parametrize(
    ("name", "table", "pattern"),
    [
        ("z-image", kohya_z_image.ORIGINAL, r".+\.attention\.to_.+|all_.+"),
        ("qwen-image-2.1", kohya_qwen_image.ORIGINAL_21, r".+\.img_mlp\.(gate_layer|proj)"),
    ],
)
def test_a_lora_on_comfyuis_own_layers_is_read(name, table, pattern, tmp_path):
    """As people train them: under the names that ComfyUI has for its layers, not under diffusers'."""
    from distill.model_families.flux import Flux
    from distill.model_families.loras.lora import read_lora

    model, (config, sizes) = PUBLISHED[name], TINY[name]
    network = empty_network(model, **config)
    layers = random_layers(network, pattern)
    state = kohya.tensors(table.renamed(layers, network.config), torch.float32)
    names = model.client.names(sizes)
    assert all(placed(names, key)[0] for key in state)
    save_file(state, tmp_path / "lora.safetensors")
    other = replace(Flux.architecture, pipeline=PIPELINES[name], original_path=table.place)
    lora = read_lora(str(tmp_path / "lora.safetensors"), 1.0, other, {"transformer": network}, fused=False)
    assert isinstance(lora, Lora)
    for path, layer in layers.items():
        up, down = (lora.state[f"transformer.{path}.lora_{part}.weight"].flatten(1) for part in "BA")
        torch.testing.assert_close(up @ down, change(layer))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("sd3.5-medium", "transformer_blocks.0.attn.to_k", "holds .*to_q, .*to_k, .*to_v as one layer, and .*to_q is"),
        ("flux.2-dev", "transformer_blocks.0.attn.add_q_proj", "one layer, and .*attn.add_k_proj is not adapted"),
        ("lumina-image-2.0", "layers.0.attn.to_v", "one layer, and layers.0.attn.to_q is not adapted"),
        ("chroma1-hd", "transformer_blocks.0.norm1.linear", "norm1.linear has no name in kohya's format"),
        ("z-image", "layers.0.attention.norm_q", "ComfyUI has no name for layers.0.attention.norm_q"),
        ("auraflow-0.3", "pos_embed.other", "ComfyUI has no name for pos_embed.other"),
        ("pixart-sigma-1024", "transformer_blocks.0.ff.net.1", "ComfyUI has no name"),
    ],
)
def test_a_lora_that_the_format_cannot_hold_is_refused(name, path, reason):
    layers = {path: Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    with pytest.raises(UserError, match=reason) as caught:
        PUBLISHED[name].kohya.renamed(layers, {"num_layers": 3})
    assert "student/pytorch_lora_weights.safetensors" in caught.value.remedy
