"""What a run's memory will depend on, known from the model's config before any weights load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..plugin_api.auxiliary import StoredNetwork
from ..plugin_api.method import is_whole_network
from ..plugin_api.quantizer import NO_CHANGE
from ..settings.configuration import default_resolution
from ..utils.devices import resolve_device
from ..utils.memory import MemorySettings
from .activation_memory import is_adapted, latent_size, planned_activations
from .builders import ITEM_BYTES, build_family, build_method, export_dtype
from .optimizer_memory import planned_state_bytes

if TYPE_CHECKING:
    from torch import nn

    from ..plugin_api.family import ModelFamily
    from ..plugin_api.method import Method, Role
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..settings.run_settings import RunSettings


def planned_memory(
    configuration: Configuration, registry: Registry, *, family: ModelFamily | None = None, activations: bool = True
) -> MemorySettings | None:
    """Return what the memory of the run depends on, from the model's config alone; None where the family has none.

    Args:
        configuration: The run's.
        registry: The run's plugins.
        family: The run's; built unless given.
        activations: Count what is kept for the backward pass, which takes half a second for SDXL; else it is rough.
    """
    import torch

    run = configuration.run
    family = family or build_family(configuration, registry)
    network = family.empty_network()
    if network is None:
        return None
    base = sum(parameter.numel() for parameter in network.parameters())
    method = build_method(configuration, registry, family)
    roles = {role.name: role for role in method.roles(method.config, method.setup)}
    own = {name: _own_parameters(role, roles, network, family, run) for name, role in roles.items()}
    averages = [name for name, role in roles.items() if role.source] + ["student"] * run.use_ema
    optimizer = registry.get("optimizer", run.optimizer)
    trained = {name: own[name] for name, role in roles.items() if role.trains != "none"}
    idle = idle_parameters(roles, network, family)
    trained_bytes = getattr(torch, optimizer.parameter_dtype).itemsize
    width, height = default_resolution(configuration)
    largest, outside = units(family, network)
    return MemorySettings(
        base_parameters=base,
        trained_parameters=sum(trained.values()),
        idle_parameters=sum(idle.values()),
        largest_role=max((count - idle.get(name, 0) for name, count in trained.items()), default=0),
        latent_pixels=math.prod(latent_size(family, (width, height))),
        batch=configuration.largest_batch,
        base_bytes=base_bytes(configuration, registry, network),
        compute_bytes=4 if run.mixed_precision == "no" else 2,
        trained_bytes=trained_bytes,
        optimizer_bytes=planned_state_bytes(configuration, registry),
        averaged_parameters=sum(own[name] for name in averages),
        student_parameters=own["student"],
        quantisable=all(role.trains != "full" for role in roles.values()),
        full_student=run.model_type == "full",
        staged=run.checkpoint_async and resolve_device(run.device) == "cpu",
        gradient_checkpointing=run.gradient_checkpointing,
        activation_offload=run.activation_offload,
        kept=planned_activations(configuration, family, network, (width, height)) if activations else None,
        decoding_bytes=decoding_bytes(method, family, (width, height)),
        own_decoder=run.pixel_decoder is None,
        auxiliary_bytes=sum(stored_bytes(role) for role in roles.values() if role.auxiliary),
        **of_whole_networks(roles, own, averages),
        **of_phases(configuration, family, network, student=own["student"]),
        largest_unit=largest,
        outside_units=outside,
    )


def of_phases(
    configuration: Configuration, family: ModelFamily, network: nn.Module | None, *, student: int
) -> dict[str, int]:
    """Return the settings of the phases beside training, from configs alone.

    Args:
        configuration: The run's.
        family: The run's.
        network: The denoiser on the meta device; None where the family has none.
        student: Number of trained weights that are exported.
    """
    run, size = configuration.run, default_resolution(configuration)
    text, vae = family.text_bytes(), family.autoencoder_bytes()
    images = any(entry.has_images for entry in configuration.datasets)
    encoding = vae + family.encoding_bytes(size, images=run.vae_batch_size) if images else 0
    validates = bool(run.validation_step_interval or run.evaluation_num_samples)
    item = ITEM_BYTES[export_dtype(run) or "float32"]
    full = run.model_type == "full"
    copied = student * item if not full or export_dtype(run) is not None else 0  # fp32 is written from where it lies
    return {
        "encoding_bytes": max(text, encoding),
        "loading_bytes": _fusing_bytes(network, run) if run.teacher_lora and network is not None else 0,
        "validating_bytes": vae + family.generating_bytes(size, images=run.num_validation_images) if validates else 0,
        "exporting_bytes": copied + (text + vae if full else 0),
    }


def _fusing_bytes(network: nn.Module, run: RunSettings) -> int:
    """Return the bytes of the base, and of its largest weight in fp32: before, the change, after."""
    sizes = [weight.numel() for weight in network.parameters()]
    return sum(sizes) * (4 if run.mixed_precision == "no" else 2) + 3 * 4 * max(sizes)


def of_whole_networks(roles: Mapping[str, Role], own: Mapping[str, int], averages: Sequence[str]) -> dict[str, int]:
    """Return the settings that say how much of what is trained and averaged belongs to roles that train all weights.

    Args:
        roles: The method's, by name.
        own: Parameters of each.
        averages: Names of the roles that are averages or copies; ``student`` once more for its average of ``use_ema``.
    """
    whole = [name for name, role in roles.items() if role.trains == "full"]
    return {
        "full_roles": len(whole),
        "full_parameters": sum(own[name] for name in whole),
        "averaged_full_parameters": sum(own[name] for name in averages if is_whole_network(roles, name)),
    }


def idle_parameters(roles: Mapping[str, Role], network: nn.Module | None, family: ModelFamily) -> dict[str, int]:
    """Count the weights that no loss reaches, of each role that trains a whole network for its features alone.

    Args:
        roles: The run's, by name.
        network: The denoiser on the meta device; None where the family has none.
        family: The run's.
    """
    import torch

    names = [name for name, role in roles.items() if role.features_only and role.trains == "full"]
    cond = family.empty_conditioning(network) if names and network is not None else None
    if cond is None or network is None:
        return {}
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: called.append(module)) for module in network.modules()
    ]
    with torch.no_grad(), torch.device("meta"):
        sample = torch.empty(1, family.latent_channels, *latent_size(family, (512, 512)))
        family.features(network, sample, torch.zeros(1), cond)
    for hook in hooks:
        hook.remove()
    reached = {weight for module in called for weight in module.parameters(recurse=False)}
    idle = sum(weight.numel() for weight in network.parameters() if weight not in reached)
    return dict.fromkeys(names, idle)


def units(family: ModelFamily, network: nn.Module) -> tuple[int, int]:
    """Return the parameters of the largest block that is gathered at a time where weights are sharded, and of all that
    is in no block.
    """
    blocks = [network.get_submodule(name) for name in family.shard_units(network)]
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in blocks]
    total = sum(weight.numel() for weight in network.parameters())
    return max(sizes, default=0), total - sum(sizes)


def _own_parameters(
    role: Role, roles: Mapping[str, Role], network: nn.Module, family: ModelFamily, run: RunSettings
) -> int:
    """Count the weights that belong to a role alone: of its adapter, its copy of the network, its heads.

    A module of the method's own counts as none: only its factory knows it, and it is small.
    """
    import torch

    from ..diffusion.adversarial import Heads

    if role.source is not None:
        return _own_parameters(roles[role.source], roles, network, family, run)
    if role.trains == "lora":
        return adapter_parameters(network, run.lora_rank, tuple(run.lora_target_modules) or family.lora_targets)
    if role.trains == "head":
        with torch.device("meta"):
            channels = [role.head_inputs * width for width in family.feature_channels(network)]
            network = Heads(channels, kind=role.heads, levels=role.head_levels)
    return 0 if role.trains in ("none", "module") else sum(weight.numel() for weight in network.parameters())


def decoding_bytes(method: Method, family: ModelFamily, resolution: tuple[int, int]) -> int:
    """Return the bytes that decoding with a gradient takes; 0 for a method that does not.

    Args:
        method: The run's.
        family: The run's.
        resolution: (width, height) in pixels.
    """
    needs = method.requires(method.config, method.setup)
    return family.decoding_bytes(math.prod(resolution)) if needs.pixels else 0


def stored_bytes(role: Role) -> int:
    """Return the bytes of the file that an auxiliary network comes from; 0 where its factory has none."""
    return role.build.stored_bytes() if isinstance(role.build, StoredNetwork) else 0


def base_bytes(configuration: Configuration, registry: Registry, network: nn.Module) -> float:
    """Return the bytes per frozen weight of `network`, quantised as the run asks for."""
    from torch import nn

    run = configuration.run
    item = 4 if run.mixed_precision == "no" else 2
    if run.frozen_base_precision == NO_CHANGE:
        return item
    quantizer = registry.get("quantizer", run.frozen_base_precision)
    kinds = tuple(getattr(nn, name) for name in quantizer.layers)
    total = sum(weight.numel() for weight in network.parameters())
    layers = [layer for layer in network.modules() if type(layer) in kinds]
    packed = sum(weight.numel() for layer in layers for name, weight in layer.named_parameters() if name == "weight")
    return (packed * quantizer.bytes_per_weight + (total - packed) * item) / total


def adapter_parameters(network: nn.Module, rank: int, targets: tuple[str, ...]) -> int:
    """Count the parameters of a LoRA of `rank` on the modules whose names end with one of `targets`."""
    total = 0
    for name, module in network.named_modules():
        if is_adapted(name, module, targets):
            weight = module.get_parameter("weight")
            total += rank * (weight[0].numel() + weight.shape[0])
    return total
