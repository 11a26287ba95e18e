"""What a model's own files say about a pipeline that has no family here: its parts, its linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ..files.architecture import Architecture, ReadConfig
from ..files.open_source import open_source

if TYPE_CHECKING:
    from torch import nn

    from ...core.plugin_api.family import ModelSettings

DENOISERS = ("transformer", "unet")


def _no_check(name: str, config: ReadConfig) -> None:
    """Check nothing: the description is compared with the pipeline."""


ANY = Architecture(
    title="a pipeline of diffusers", pipeline="DiffusionPipeline", accepted=(), denoiser="transformer",
    denoiser_class="", tokenizers={}, encoders={}, check=_no_check, made_of="",
)  # fmt: skip
"""What is known of a model before its ``model_index.json`` is read."""


def described_architecture(settings: ModelSettings, config: Any) -> Architecture:
    """Return the architecture that the model's ``model_index.json`` and the description name.

    Raises:
        UserError: It has no denoiser, no autoencoder or no scheduler, or its classes are none of diffusers'.
    """
    source = open_source(settings.source, ANY, revision=settings.revision, variant=config.variant)
    index = source.config("model_index.json")
    return architecture_of(settings.source, index, denoiser=config.denoiser, packing=config.packing)


def architecture_of(
    model: str, index: Mapping[str, Any], *, denoiser: str | None = None, packing: str = "none"
) -> Architecture:
    """Return the architecture that a ``model_index.json`` names.

    Args:
        model: The model, for messages.
        index: The file's content.
        denoiser: Component that is distilled; None: ``transformer`` or ``unet``.
        packing: Form of the latents in the network's call.

    Raises:
        UserError: As :func:`described_architecture` does.
    """
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    wanted = (denoiser,) if denoiser else DENOISERS
    denoiser = next((name for name in wanted if name in parts), None)
    if denoiser is None or not {"vae", "scheduler"} <= set(parts):
        raise UserError(
            f"model {model!r} has {', '.join(parts)} (model_index.json), and a denoiser "
            f"({' or '.join(wanted)}), a vae and a scheduler are needed",
            "name the denoiser: family_config.generic.denoiser",
        )
    kinds = {name: value[1] for name, value in parts.items()}
    own = {denoiser, "vae", "scheduler"}
    text = {name: kind for name, kind in kinds.items() if name.startswith(("tokenizer", "text_encoder"))}
    pipeline = _known(model, index.get("_class_name"))
    return Architecture(
        title=f"a {pipeline}",
        pipeline=pipeline,
        accepted=(pipeline,),
        denoiser=denoiser,
        denoiser_class=_known(model, kinds[denoiser]),
        tokenizers={name: kind for name, kind in text.items() if name.startswith("tokenizer")},
        encoders={name: kind for name, kind in text.items() if name.startswith("text_encoder")},
        check=partial(_check_latents, denoiser, packing),
        made_of=f"it is described as one of {', '.join(sorted(own | set(text)))}",
        lora_encoders=(),
        arguments={name: None for name in kinds if name not in {*own, *text}} | _scalars(index),
        autoencoder=_known(model, kinds["vae"]),
    )


def _scalars(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pipeline's own settings, as ``force_zeros_for_empty_prompt``, and None for parts that are absent."""
    own = {name: value for name, value in index.items() if name[0] != "_" and not isinstance(value, list)}
    return own | {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}


def _known(model: str, name: Any) -> str:
    import diffusers

    if not isinstance(getattr(diffusers, str(name), None), type):
        raise UserError(
            f"model {model!r} needs {name}, which diffusers {diffusers.__version__} lacks (model_index.json)",
            "pip install --upgrade diffusers, or write a family of your own: distill plugins new family NAME",
        )
    return str(name)


def _check_latents(denoiser: str, packing: str, name: str, config: ReadConfig) -> None:
    """Raise UserError unless the denoiser takes the latents of the autoencoder."""
    from ..calls.autoencoders import kind_named

    vae, network = config("vae/config.json"), config(f"{denoiser}/config.json")
    made = kind_named(vae.get("_class_name", "")).channels(vae) * (4 if packing == "patches" else 1)
    taken = network.get("in_channels", made)
    if taken != made:
        other = "patches" if taken == 4 * made else "none"
        raise UserError(
            f"model {name!r} takes {taken} channels, and its autoencoder's latents have {made} with packing={packing} "
            f"({denoiser}/config.json: in_channels)",
            f"set family_config.generic.packing to {other}"
            if other != packing
            else "inpainting and other models with extra input channels cannot be described",
        )


def blocks_of(network: nn.Module) -> list[str]:
    """Return the names of the members of the network's lists of modules, in its order."""
    from torch import nn

    lists = ((name, one) for name, one in network.named_children() if isinstance(one, nn.ModuleList))
    return [f"{name}.{number}" for name, one in lists for number in range(len(one))]


def linear_layers(network: nn.Module) -> tuple[str, ...]:
    """Return the names of all linear layers inside the blocks."""
    from torch import nn

    inside = tuple(f"{block}." for block in blocks_of(network))
    return tuple(
        name for name, one in network.named_modules() if isinstance(one, nn.Linear) and name.startswith(inside)
    )
