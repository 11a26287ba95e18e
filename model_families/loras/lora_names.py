"""Names of layers in files of adapters -> modules of the networks, for the namings in use.

    diffusers, peft        ``unet.mid_block.attentions.0.proj_in``, ``base_model.model.mid_block...``
    sd-scripts, LyCORIS    ``lora_unet_mid_block_attentions_0_proj_in``; with the paths of the original code
                           ``lora_unet_middle_block_1_proj_in``; ``lora_te1_text_model_encoder_layers_0_mlp_fc1``
    ComfyUI, ai-toolkit    ``diffusion_model.double_blocks.0.img_attn.qkv``, the original code's paths with dots

Where the original code has one layer for several modules, a name stands for all of them, in the order of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ..files.empty import without_text_model

if TYPE_CHECKING:
    from ..files.architecture import Architecture


@dataclass(frozen=True)
class Target:
    """What a layer of a file changes.

    Attributes:
        modules: (component, module path) of each module, in the order of the layer's rows.
        swapped: Whether the first half of the layer's rows is the second of the module's.
    """

    modules: tuple[tuple[str, str], ...] = ()
    swapped: bool = False


def targets(architecture: Architecture, networks: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Target]:
    """Return every name that a module with a weight may have in a file.

    Args:
        architecture: The model's.
        networks: Denoiser and those text encoders that adapters may change, by their names in the pipeline.
        config: The denoiser's config.
    """
    found: dict[str, Target] = {}
    for component, network in networks.items():
        for path in _weighted(network):
            if component == architecture.denoiser:
                found |= dict.fromkeys(_of_denoiser(component, path), Target(((component, path),)))
                found |= _of_original(architecture, component, path, config)
            else:
                number = list(architecture.encoders).index(component) + 1
                found |= dict.fromkeys(_of_encoder(component, path, number), Target(((component, path),)))
    return found


def _weighted(network: Any) -> Iterator[str]:
    for path, module in network.named_modules():
        if path and hasattr(module, "weight"):
            yield path


def _of_denoiser(component: str, path: str) -> Iterator[str]:
    flat = path.replace(".", "_")
    yield from (f"{prefix}.{path}" for prefix in (component, "base_model.model", "diffusion_model"))
    yield from (path, f"lora_unet_{flat}", f"lora_{component}_{flat}", f"lycoris_{flat}")


def _of_original(architecture: Architecture, component: str, path: str, config: Mapping[str, Any]) -> dict[str, Target]:
    """Return the names by the original code's paths; none where it has no path for the module."""
    if architecture.original_path is None:
        return {}
    try:
        original, members = architecture.original_path(path, config)
    except (UserError, KeyError, IndexError):
        return {}
    target = Target(tuple((component, member) for member in members), path in architecture.swapped(config))
    flat = original.replace(".", "_")
    names = (f"lora_unet_{flat}", f"lycoris_{flat}", f"diffusion_model.{original}", f"model.diffusion_model.{original}")
    return dict.fromkeys(names, target)


def _of_encoder(component: str, path: str, number: int) -> Iterator[str]:
    inner = without_text_model(path)
    for full in (inner, f"text_model.{inner}"):
        flat = full.replace(".", "_")
        yield f"{component}.{full}"
        yield f"lora_te{number}_{flat}"
        if number == 1:
            yield f"lora_te_{flat}"
