"""Checks that recognise a model by its configs and tensor names; every refusal says what to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ..calls.autoencoders import kind_named

if TYPE_CHECKING:
    from .architecture import Architecture


def check_index(name: str, index: Mapping[str, Any], architecture: Architecture) -> None:
    """Raise UserError unless ``model_index.json`` names a pipeline of this architecture with every component."""
    kind = index.get("_class_name")
    if kind not in architecture.accepted:
        fits = architecture.siblings.get(str(kind))
        raise UserError(
            f"model {name!r} is a {kind}, not {architecture.title} (model_index.json: _class_name)",
            f"this family takes {', '.join(architecture.accepted)}; "
            + (f"set model_family to {fits}" if fits else "choose the model_family that fits"),
        )
    needed = [part for part in architecture.components if part not in architecture.optional]
    missing = [part for part in needed if not has_part(index, part)]
    if missing:
        raise UserError(
            f"model {name!r} lacks {', '.join(missing)} (model_index.json)",
            f"{architecture.made_of}; a partial export cannot be distilled by this family",
        )


def has_part(index: Mapping[str, Any], part: str) -> bool:
    """Return True if ``model_index.json`` lists the component."""
    return (index.get(part) or [None])[0] is not None


def check_local_folder(folder: Path, *, key: str = "model") -> None:
    """Raise UserError unless `folder` has a ``model_index.json``."""
    if (folder / "model_index.json").is_file():
        return
    singles = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"; it holds {', '.join(singles[:3])}: name that file itself" if singles else ""
    raise UserError(
        f"{key} {str(folder)!r} has no model_index.json, so it is not a model in diffusers layout",
        f"name the folder that holds model_index.json, the denoiser, vae/ and the text encoders{hint}",
    )


def check_channels(name: str, part: str, channels: Any, vae: Mapping[str, Any]) -> None:
    """Raise UserError unless the denoiser `part` takes as many `channels` as the model's own autoencoder makes."""
    made = kind_named(vae.get("_class_name", "AutoencoderKL")).channels(vae)
    if channels != made:
        raise UserError(
            f"model {name!r} takes {channels} channels, its autoencoder makes {made} ({part}/config.json: in_channels)",
            "inpainting and other models with extra input channels cannot be distilled by this family",
        )


def check_unet(name: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Raise UserError unless a UNet takes its own autoencoder's latents, and no guidance scale."""
    check_channels(name, "unet", unet.get("in_channels"), vae)
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"model {name!r} takes the guidance scale as an input (unet/config.json: time_cond_proj_dim = "
            f"{unet['time_cond_proj_dim']!r}), as a fully trained student does: it cannot teach",
            "name the model that it was made from; a guided teacher of one call is a LoRA from guidance distillation "
            "under teacher_lora",
        )


def check_kind(name: str, part: str, config: Mapping[str, Any], architecture: Architecture) -> None:
    """Raise UserError where the config of a network names another class, or weights that are quantised."""
    expected = {"vae": architecture.autoencoder, architecture.denoiser: architecture.denoiser_class}.get(part)
    kind = config.get("_class_name", expected)
    older = architecture.denoiser_aliases if part == architecture.denoiser else ()
    if expected is not None and kind not in (expected, *older):
        raise UserError(
            f"model {name!r}: its {part} is a {kind}, not a {expected} ({part}/config.json: _class_name)",
            f"name {architecture.title} whose {part} is a {expected}",
        )
    if config.get("quantization_config"):
        raise UserError(
            f"model {name!r}: its {part} is quantised ({part}/config.json: quantization_config)",
            "name the unquantised model; base_model_precision quantises it as it loads",
        )


def check_original_parts(
    name: str, tensors: Sequence[str], architecture: Architecture, *, without: Collection[str] = ()
) -> None:
    """Raise UserError unless the tensors' names are those of a whole model, except for the parts in `without`."""
    single = architecture.single_file
    assert single is not None
    adapters = sum("lora_" in key or "hada_" in key or "lokr_" in key for key in tensors)
    if adapters * 2 > len(tensors):
        raise UserError(f"{name!r} is a LoRA, not a model", "name it under teacher_lora or init_lora, beside a model")
    missing = [
        one.title
        for part, one in single.parts.items()
        if part not in without and not any(key.startswith(one.prefixes) for key in tensors)
    ]
    if missing:
        raise UserError(
            f"single file {name!r} is not a whole {architecture.name} in the original layout: it lacks "
            f"{', '.join(missing)}",
            f"name a full {architecture.name} checkpoint ({single.size}), or a folder in diffusers layout"
            + (
                "; another autoencoder is named by pretrained_vae_model_name_or_path"
                if "the autoencoder" in missing
                else ""
            ),
        )
