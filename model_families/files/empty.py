"""Networks on the meta device: names and shapes without memory, and the names that older files have for them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .reading import quiet_libraries

if TYPE_CHECKING:
    from .architecture import Architecture

KEPT = 8
"""Number of networks on the meta device that are kept."""
_built: dict[tuple[str, str, str], Any] = {}
TEXT_MODEL = "text_model."
"""Prefix of CLIP's tensors, which files have or lack by the version that wrote them."""


def empty_denoiser(architecture: Architecture, config: Mapping[str, Any]) -> Any:
    """Build a denoiser on the meta device."""
    import torch

    with quiet_libraries(), torch.device("meta"):
        return architecture.network_class().from_config(dict(config))


def filled_denoiser(
    architecture: Architecture, config: Mapping[str, Any], state: Mapping[str, Tensor], *, device: str
) -> Any:
    """Build a denoiser whose weights are the tensors of `state`, which are on the device."""
    network = empty_denoiser(architecture, config)
    network.load_state_dict(state, assign=True)
    fill_tables(network, architecture, config, device=device)
    return network


def fill_tables(network: nn.Module, architecture: Architecture, config: Mapping[str, Any], *, device: str) -> None:
    """Give a denoiser of the meta device, whose weights are there, what files lack: tables of positions, made from the
    config. They are buffers that are not saved, or attributes.

    Args:
        network: The denoiser.
        architecture: Its architecture.
        config: Its config.
        device: Where its weights are.
    """
    empty = {path: _empty_tables(module) for path, module in network.named_modules()}
    if not any(empty.values()):
        return
    from accelerate import init_empty_weights

    with quiet_libraries(), init_empty_weights(include_buffers=False):
        whole = architecture.network_class().from_config(dict(config))
    for path, names in empty.items():
        for name in names:
            table = getattr(whole.get_submodule(path), name)
            setattr(network.get_submodule(path), name, tree_map_only(Tensor, lambda each: each.to(device), table))


def _empty_tables(module: nn.Module) -> list[str]:
    """Return the names of the tables of a module, its own alone, that are on the meta device."""
    attributes = {name: value for name, value in vars(module).items() if name[0] != "_"}
    leaves = {name: tree_leaves(value) for name, value in {**module._buffers, **attributes}.items()}
    return [name for name, own in leaves.items() if any(isinstance(each, Tensor) and each.is_meta for each in own)]


def empty_network(architecture: Architecture, part: str, config: Mapping[str, Any]) -> Any:
    """Return any network of an architecture on the meta device, to be looked at and not changed: it is built once."""
    key = (architecture.denoiser_class, architecture.encoders.get(part, part), json.dumps(config, sort_keys=True))
    if key not in _built:
        while len(_built) >= KEPT:
            _built.pop(next(iter(_built)))
        _built[key] = _build(architecture, part, config)
    return _built[key]


def _build(architecture: Architecture, part: str, config: Mapping[str, Any]) -> Any:
    import torch

    if part == architecture.denoiser:
        return empty_denoiser(architecture, config)
    with quiet_libraries(), torch.device("meta"):
        if part == "vae":
            return architecture.autoencoder_class().from_config(dict(config))
        return architecture.new_encoder(part, config).to("meta")  # some make their parts elsewhere


def by_name_of(network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of `network`, as its library's loader maps those of older versions."""
    found = dict(tensors)
    if hasattr(network, "_fix_state_dict_keys_on_load"):  # of diffusers: attention of old autoencoders
        network._fix_state_dict_keys_on_load(found)
        return found
    own = network.state_dict()
    renamed = _renaming(network, own)
    return {_text_name(name, own, renamed): tensor for name, tensor in found.items()}


def _text_name(name: str, own: Mapping[str, Any], renamed: Callable[[str], str]) -> str:
    """Return the name of a text encoder's tensor with one ``text_model.`` more or less, or as its library renames it,
    where that is its own.
    """
    for other in (name, TEXT_MODEL + name, name.removeprefix(TEXT_MODEL)):
        if other in own:
            return other
    return other if (other := renamed(name)) in own else name


def _renaming(network: Any, own: dict[str, Any]) -> Callable[[str], str]:
    """Return how transformers renames a file's tensor for `network`: layouts of its older versions, and models with a
    head or inside a larger one.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before version 5
        patterns = getattr(network, "_checkpoint_conversion_mapping", None) or {}
        return lambda name: functools.reduce(lambda found, each: re.sub(*each, found), patterns.items(), name)
    known = get_model_conversion_mapping(network, add_legacy=False)
    names = [each for each in known if isinstance(each, WeightRenaming)]
    return lambda name: rename_source_key(name, names, [], network.base_model_prefix, own)[0]


def without_text_model(name: str) -> str:
    """Return the name without any number of ``text_model.`` in front."""
    return re.sub(rf"^({re.escape(TEXT_MODEL)})+", "", name)
