"""What a sample of a run keeps for the backward pass: from the denoiser itself, on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..settings.configuration import default_resolution
from ..utils.simulated_training import KeptBytes, kept_bytes

if TYPE_CHECKING:
    from torch import nn

    from ..plugin_api.family import ModelFamily
    from ..settings.configuration import Configuration

_known: dict[tuple[object, ...], KeptBytes] = {}


def planned_activations(
    configuration: Configuration,
    family: ModelFamily,
    network: nn.Module,
    size: tuple[int, int],
    *,
    wide_norms: bool = True,
) -> KeptBytes | None:
    """Return what one sample keeps for the backward pass of the student; None where the family cannot say.

    Args:
        configuration: The run's.
        family: The run's.
        network: Its denoiser on the meta device.
        size: (width, height) of an image in pixels.
        wide_norms: Count norms in fp32 under autocast, as on CUDA: up to a third more than on a CPU.
    """
    import torch

    run = configuration.run
    targets = (tuple(run.lora_target_modules) or family.lora_targets) if run.model_type == "lora" else ()
    asked = size, targets, run.lora_rank, run.mixed_precision, wide_norms
    key = (id(network), family.name, repr(family.config), *asked)
    if key in _known:
        return _known[key]
    cond = family.empty_conditioning(network)
    if cond is None:
        return None
    with torch.device("meta"):
        sample, time = torch.empty(1, family.latent_channels, *latent_size(family, size)), torch.zeros(1)
    _known[key] = kept_bytes(
        network, lambda x: family.predict(network, x, time, cond), sample,
        half=run.mixed_precision != "no", wide_norms=wide_norms,
        adapted=[name for name, module in network.named_modules() if is_adapted(name, module, targets)],
        rank=run.lora_rank,
    )  # fmt: skip
    return _known[key]


def run_activations(configuration: Configuration, family: ModelFamily) -> KeptBytes | None:
    """Return :func:`planned_activations` of the run's own resolution."""
    network = family.empty_network()
    return network and planned_activations(configuration, family, network, default_resolution(configuration))


def latent_size(family: ModelFamily, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the latents of images of `size`, (width, height)."""
    return size[1] // family.scale_factor, size[0] // family.scale_factor


def is_adapted(name: str, module: nn.Module, targets: tuple[str, ...]) -> bool:
    """Return True if a LoRA on `targets` adapts the module of this name."""
    from torch import nn

    plain = isinstance(module, (nn.Linear, nn.Conv2d))
    return plain and any(name == target or name.endswith(f".{target}") for target in targets)
