"""What makes a model an SDXL, by its configs and tensor names; every refusal says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import UserError

PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetPipeline")
COMPONENTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "unet", "scheduler")


def check_index(name: str, index: Mapping[str, Any]) -> None:
    """Raise UserError unless ``model_index.json`` names an SDXL pipeline with every component."""
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(
            f"model {name!r} is a {kind}, not an SDXL (model_index.json: _class_name)",
            f"the family sdxl takes {', '.join(PIPELINES)}; choose the model_family that fits",
        )
    missing = [part for part in COMPONENTS if (index.get(part) or [None])[0] is None]
    if missing:
        raise UserError(
            f"model {name!r} lacks {', '.join(missing)} (model_index.json)",
            "an SDXL base model has two text encoders and two tokenizers; a refiner or a partial export cannot "
            "be distilled by this family",
        )


def check_local_folder(folder: Path, *, key: str = "model") -> None:
    """Raise UserError unless `folder` has a ``model_index.json``."""
    if (folder / "model_index.json").is_file():
        return
    singles = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"; it holds {', '.join(singles[:3])}: name that file itself" if singles else ""
    raise UserError(
        f"{key} {str(folder)!r} has no model_index.json, so it is not a model in diffusers layout",
        f"name the folder that holds model_index.json, unet/, vae/ and the text encoders{hint}",
    )


def check_unet(name: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Raise UserError unless the configs are those of an SDXL's UNet and its own autoencoder."""
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(
            f"model {name!r} is not an SDXL (unet/config.json: addition_embed_type = "
            f"{unet.get('addition_embed_type')!r}, expected 'text_time')",
            "choose the model_family that fits",
        )
    if unet.get("in_channels") != vae.get("latent_channels", 4):
        raise UserError(
            f"model {name!r} takes {unet.get('in_channels')} channels, its autoencoder makes "
            f"{vae.get('latent_channels', 4)} (unet/config.json: in_channels)",
            "inpainting and other models with extra input channels cannot be distilled by this family",
        )

    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"model {name!r} takes the guidance scale as an input (unet/config.json: time_cond_proj_dim = "
            f"{unet['time_cond_proj_dim']!r}), as a fully trained student does: it cannot teach",
            "name the model that it was made from; a guided teacher of one call is a LoRA from guidance distillation "
            "under teacher_lora",
        )


def check_original_keys(name: str, header: Mapping[str, Any]) -> None:
    """Raise UserError unless the tensors' names are those of a whole SDXL in the original layout."""
    keys = [key for key in header if key != "__metadata__"]
    if any("lora" in key for key in keys):
        raise UserError(f"{name!r} is a LoRA, not a model", "name it under teacher_lora or init_lora, beside a model")
    needed = {
        "the UNet": "model.diffusion_model.",
        "the autoencoder": "first_stage_model.",
        "the first text encoder": "conditioner.embedders.0.",
        "the second text encoder": "conditioner.embedders.1.",
    }
    missing = [what for what, prefix in needed.items() if not any(key.startswith(prefix) for key in keys)]
    if missing:
        raise UserError(
            f"single file {name!r} is not a whole SDXL in the original layout: it lacks {', '.join(missing)}",
            "name a full SDXL checkpoint (about 6.5 GB in fp16), or a folder in diffusers layout",
        )
