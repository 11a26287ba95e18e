"""What a run's memory depends on: from the model's config beforehand, and from its networks once they are there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..plugin_api.precision import BASE
from ..plugin_api.quantizer import NO_CHANGE
from ..settings.configuration import default_resolution
from ..utils.memory import (
    MemorySettings,
    estimate,
    free_memory_bytes,
    gigabytes,
    is_out_of_memory,
    out_of_memory_hint,
    savings_lines,
)

if TYPE_CHECKING:
    from torch import nn

    from ..plugin_api.family import ModelFamily
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from .components import RunComponents


def memory_warning(settings: MemorySettings, device: str, *, quantizers: bool) -> str | None:
    """Return a warning where a run is not expected to fit into the memory that is free; None where it is.

    Args:
        settings: Of the run.
        device: The one that it trains on.
        quantizers: Whether the base can be quantised.
    """
    expected, free = estimate(settings), free_memory_bytes(device)
    if expected.total <= free:
        return None
    fixed = expected.total - expected.activations
    sure = "it will not fit" if fixed > free else "it may not fit (activations are rough)"
    return "\n".join(
        [
            f"this run is estimated at {gigabytes(expected.total)} of memory, and {gigabytes(free)} are free on "
            f"{device}: {sure}. What would save how much:",
            *savings_lines(settings, quantizers=quantizers),
        ]
    )


def explain_memory(run: RunComponents, error: BaseException) -> Iterator[str]:
    """Yield the hint of what would save how much, where `error` came from an allocation that failed."""
    if not is_out_of_memory(error):
        return
    loaded = "networks" in vars(run)
    settings = memory_settings(run) if loaded else run.planned_memory
    if settings is not None:
        yield out_of_memory_hint(settings, quantizers=run.settings.model_type == "lora")


def memory_settings(run: RunComponents) -> MemorySettings:
    """The settings of a run whose networks are loaded."""
    settings, networks = run.settings, run.networks
    trained = [p for role in networks.trained_roles() for p in networks.parameters(role)]
    frozen = [p for p in networks.base.parameters() if not p.requires_grad]
    width, height = run.resolution
    scale = run.family.scale_factor
    averages = sum(role.source is not None for role in networks.roles.values()) + settings.use_ema
    item = trained[0].element_size()
    stored = run.family.settings.precision.stored(BASE)
    base_bytes = frozen[0].element_size()
    num_frozen = sum(p.numel() for p in frozen)
    if stored is not None:  # packed numbers are not parameters one by one
        num_frozen = stored[0] // base_bytes
        base_bytes = stored[1] / num_frozen
    state_bytes = run.optimizer_plugin.state_bytes
    return MemorySettings(
        base_parameters=num_frozen,
        trained_parameters=sum(p.numel() for p in trained),
        latent_pixels=(width // scale) * (height // scale),
        batch=run.config.largest_batch,
        base_bytes=base_bytes,
        compute_bytes=4 if settings.mixed_precision == "no" else 2,
        trained_bytes=item,
        optimizer_bytes=2 * item if state_bytes is None else state_bytes,
        num_averages=averages,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def planned_memory(
    configuration: Configuration, registry: Registry, *, family: ModelFamily | None = None
) -> MemorySettings | None:
    """Return what the memory of the run depends on, from the model's config alone; None where the family has none.

    Args:
        configuration: The run's.
        registry: The run's plugins.
        family: The run's; built unless given.
    """
    import torch

    from .builders import build_family, build_method

    run = configuration.run
    family = family or build_family(configuration, registry)
    network = family.empty_network()
    if network is None:
        return None
    base = sum(parameter.numel() for parameter in network.parameters())
    method = build_method(configuration, registry, family)
    roles = method.roles(configuration.method, method.setup)
    per_role = base
    if run.model_type == "lora":
        per_role = adapter_parameters(network, run.lora_rank, tuple(run.lora_target_modules) or family.lora_targets)
    optimizer = registry.get("optimizer", run.optimizer)
    trained_bytes = getattr(torch, optimizer.parameter_dtype).itemsize
    width, height = default_resolution(configuration)
    return MemorySettings(
        base_parameters=base,
        trained_parameters=per_role * sum(role.trains != "none" for role in roles),
        latent_pixels=math.prod(edge // family.scale_factor for edge in (width, height)),
        batch=configuration.largest_batch,
        base_bytes=base_bytes(configuration, registry, network),
        compute_bytes=4 if run.mixed_precision == "no" else 2,
        trained_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes if optimizer.state_bytes is None else optimizer.state_bytes,
        num_averages=sum(role.ema_of is not None for role in roles) + run.use_ema,
        gradient_checkpointing=run.gradient_checkpointing,
    )


def base_bytes(configuration: Configuration, registry: Registry, network: nn.Module) -> float:
    """Return the bytes per frozen weight of `network`, quantised as the run asks for."""
    from torch import nn

    run = configuration.run
    item = 4 if run.mixed_precision == "no" else 2
    if run.base_model_precision == NO_CHANGE:
        return item
    quantizer = registry.get("quantizer", run.base_model_precision)
    kinds = tuple(getattr(nn, name) for name in quantizer.layers)
    total = sum(weight.numel() for weight in network.parameters())
    layers = [layer for layer in network.modules() if type(layer) in kinds]
    packed = sum(weight.numel() for layer in layers for name, weight in layer.named_parameters() if name == "weight")
    return (packed * quantizer.bytes_per_weight + (total - packed) * item) / total


def adapter_parameters(network: nn.Module, rank: int, targets: tuple[str, ...]) -> int:
    """Count the parameters of a LoRA of `rank` on the modules whose names end with one of `targets`."""
    from torch import nn

    total = 0
    for name, module in network.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            if isinstance(module, nn.Linear):
                total += rank * (module.in_features + module.out_features)
            elif isinstance(module, nn.Conv2d):
                kernel = module.kernel_size[0] * module.kernel_size[1]
                total += rank * (module.in_channels * kernel + module.out_channels)
    return total
