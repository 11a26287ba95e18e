"""Random models of the classes of another, small enough to be tried on a CPU: from its configs, without weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ..files.architecture import Architecture
from ..files.encoder_files import file_as
from ..files.open_source import open_source
from ..files.reading import quiet_libraries
from ..files.source import FolderSource, settings_in
from .generic_model import ANY, architecture_of

LAYERS, HEADS, WIDTH = 2, 2, 32
COUNTS = {
    *("num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "num_refiner_layers", "depth"),
    *("num_mmdit_layers", "num_single_dit_layers", "num_decoder_layers", "num_hidden_layers", "layers_per_block"),
    *("transformer_layers_per_block", "num_res_blocks", "encoder_layers_per_block", "decoder_layers_per_block"),
}
"""Keys that count layers."""
HEAD_COUNTS = {
    *("num_attention_heads", "n_heads", "num_heads", "num_key_value_heads", "n_kv_heads", "num_kv_heads"),
    *("num_cross_attention_heads", "attention_heads"),
}
TEXT_WIDTHS = ("hidden_size", "d_model", "projection_dim")
INNER_WIDTHS = {"intermediate_size", "d_ff", "ffn_hidden_size"}
HEAD_WIDTHS = ("attention_head_dim", "head_dim", "d_kv", "kv_channels")
LEVELS = {"block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels"}
SMALLEST_ENCODER = 3
"""Layers of a text encoder, so that its states before the last layer are none of the ends."""


def write_small_copy(model: str, folder: Path) -> None:
    """Write a random model of the classes of `model` into `folder`, with few narrow layers and its own tokenizers.

    Args:
        model: Folder in diffusers layout, which may lack the weights, or hub id.
        folder: Where it goes.

    Raises:
        UserError: A part of it cannot be made small by its config alone.
    """
    import torch

    source = open_source(model, ANY)
    assert isinstance(source, FolderSource)
    architecture = architecture_of(model, source.config("model_index.json"))
    widths: dict[int, int] = {}
    parts = {}
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(0)
        for part in (*architecture.encoders, "vae", architecture.denoiser):
            config = _small_config(architecture, part, source.config(f"{part}/config.json"), widths)
            parts[part] = config, _random(model, architecture, part, config)
    for part, (config, network) in parts.items():
        network.save_pretrained(folder / part)
        if part in architecture.encoders:
            file_as(config, folder / part)
    for part in (*architecture.tokenizers, "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for file in settings_in([source.component(part)]):
            shutil.copy(file, folder / part / file.name)
    (folder / "model_index.json").write_text(json.dumps(source.config("model_index.json"), indent=2), encoding="utf-8")


def _small_config(
    architecture: Architecture, part: str, config: Mapping[str, Any], widths: dict[int, int]
) -> dict[str, Any]:
    """Return a network's config made small; `widths` (as published -> small) gets what others' have to follow."""
    if part in architecture.encoders:
        return small_encoder(config, widths)
    return small_autoencoder(config) if part == "vae" else small_denoiser(config, widths)


def _random(model: str, architecture: Architecture, part: str, config: Mapping[str, Any]) -> Any:
    """Return a random network of this config."""
    try:
        if part in architecture.encoders:
            network = architecture.new_encoder(part, config)
        else:
            kind = architecture.autoencoder_class() if part == "vae" else architecture.network_class()
            network = kind.from_config(dict(config))
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, KeyError) as error:
        raise UserError(
            f"model {model!r}: its {part} cannot be made small by its config alone ({type(error).__name__}: {error})",
            "write example() of the family by hand, as the tutorial 'your own family' does",
        ) from error
    return _different(network.eval())


def _different(network: Any) -> Any:
    """Move all weights from where they begin: layers of zeros would hide what comes after them."""
    import torch

    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any() or weight.ndim < 2:
                weight.add_(0.2 * torch.randn(weight.shape))
    return network


def small_encoder(config: Mapping[str, Any], widths: dict[int, int]) -> dict[str, Any]:
    """Return a text encoder's config with three layers of width 32; nested ones of text and images too."""
    found = dict(config)
    for key, value in config.items():
        if isinstance(value, Mapping) and (key.endswith("_config") or key in ("encoder", "decoder")):
            found[key] = small_encoder(value, widths)
        elif key in COUNTS and isinstance(value, int):
            found[key] = min(value, SMALLEST_ENCODER)
        elif key in HEAD_COUNTS and isinstance(value, int):
            found[key] = min(value, HEADS)
        elif key in TEXT_WIDTHS and isinstance(value, int):
            found[key] = widths[value] = WIDTH
        elif key in INNER_WIDTHS and isinstance(value, int):
            found[key] = 2 * WIDTH
        elif key in HEAD_WIDTHS and isinstance(value, int):
            found[key] = WIDTH // HEADS
        elif key == "layer_types":
            found[key] = list(value)[:SMALLEST_ENCODER]
    found.pop("rope_scaling", None)
    return found


def small_autoencoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an autoencoder's config with narrow levels, as many as it has, and its latents."""
    found = dict(config)
    for key, value in config.items():
        if key in LEVELS:
            found[key] = [8 * min(number + 1, 2) for number in range(len(value))]
        elif key in COUNTS:
            found[key] = 1 if isinstance(value, int) else [1] * len(value)
        elif key in ("base_dim", "decoder_base_dim") and value is not None:
            found[key] = 8
    return found | ({"norm_num_groups": 4} if "norm_num_groups" in config else {})


def small_denoiser(config: Mapping[str, Any], widths: Mapping[int, int]) -> dict[str, Any]:
    """Return a denoiser's config with two layers of two heads; the width of a head stays, and what the text encoders
    give is as narrow as they are now.

    Args:
        config: As published.
        widths: Widths of the text encoders: as published -> small.
    """
    heads = next((config[key] for key in HEAD_COUNTS if isinstance(config.get(key), int)), None)
    width = next((config[key] for key in HEAD_WIDTHS if isinstance(config.get(key), int)), None)
    known = dict(widths) | {sum(widths): sum(widths.values())}
    if heads and width:
        known[heads * width] = HEADS * width
    for key in ("dim", "hidden_size", "inner_dim"):
        if heads and isinstance(config.get(key), int):
            known[config[key]] = config[key] // heads * HEADS
    found = {}
    for key, value in config.items():
        if key in COUNTS and isinstance(value, int):
            found[key] = min(value, LAYERS)
        elif key in HEAD_COUNTS and isinstance(value, int):
            found[key] = HEADS
        elif isinstance(value, int) and not isinstance(value, bool) and value in known and "channels" not in key:
            found[key] = known[value]
        else:
            found[key] = value
    return found
