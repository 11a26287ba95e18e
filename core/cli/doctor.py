"""`distill doctor`: what this machine has and lacks, for a configuration where one is given."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import options
from .options import Given, takes_configuration

if TYPE_CHECKING:
    from torch import nn

    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..utils.memory import MemorySettings

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pydantic")
Rows = Iterator[tuple[str, str]]


@takes_configuration()
def doctor(given: Given) -> None:
    """Report what this machine has and lacks for a configuration: device, memory, optional packages, credentials."""
    _section("machine", machine(given.output_dir or Path.cwd()))
    _section("packages", packages(given.registry()))
    _section("credentials", credentials())
    if not any((given.method, given.family, given.config, given.data, given.model, given.set_)):
        typer.echo("\nno configuration given: --config FILE adds its checks and an estimate of its memory")
        return
    configuration, registry = given.load()
    unchecked = options.model_notices(configuration, registry)
    notices = (*unchecked, *configuration.notices, *options.service_notices(configuration, registry))
    _section("configuration", (("notice", line) for line in notices or ("nothing to be said",)))
    _section("accounts", accounts(configuration, registry))
    _section("memory", memory(configuration, registry))


def _section(title: str, rows: Rows) -> None:
    rows = list(rows)  # type: ignore[assignment]
    typer.echo(f"\n{title}")
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"  {name:<{width}}  {value}")


def machine(folder: Path) -> Rows:
    """Return interpreter, processors, memory, disk and accelerators."""
    import psutil
    import torch

    from ..utils.memory import gigabytes

    yield "python", platform.python_version()
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    memory = psutil.virtual_memory()
    yield "memory", f"{gigabytes(memory.total)}, {gigabytes(memory.available)} available"
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    yield "disk", f"{gigabytes(shutil.disk_usage(existing).free)} free under {existing}"
    if not torch.cuda.is_available():
        yield "device", "mps" if torch.backends.mps.is_available() else "cpu (PyTorch sees no CUDA device)"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use mixed_precision fp16"
        yield f"cuda:{index}", f"{properties.name}, {gigabytes(properties.total_memory)}, {bf16}"


def packages(registry: Registry) -> Rows:
    """Return the versions of what is required, and of what plugins can use."""
    from ..registry.registry import KINDS
    from ..utils.packages import missing

    for name in REQUIRED:
        yield name, _version(name)
    for kind in KINDS:
        for name in registry.names(kind):
            for package, install in missing(registry.get(kind, name).packages).items():
                yield package, f"missing; the {kind.replace('_', ' ')} {name} needs it: pip install '{install}'"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"missing; pip install {name}"


def credentials() -> Rows:
    """Return the accounts that are known; nothing requires one, and no secret is shown."""
    from huggingface_hub import get_token

    from ..storage.s3 import account

    yield "AWS", account()
    yield "Hugging Face", "a token is there" if get_token() else "no token (only push_to_hub and gated models need one)"


def accounts(configuration: Configuration, registry: Registry) -> Rows:
    """Return the origin of the credentials of each entry of the data file, in words."""
    for entry in (*configuration.datasets, *configuration.caches):
        backend = registry.get("data_backend", entry.type)
        said = backend(entry.backend).account if entry.backend is not None else ""
        yield f"data.{entry.id}", said or "none is needed"


def memory(configuration: Configuration, registry: Registry) -> Rows:
    """Return the estimate by purpose, and how much each remedy would save."""
    from ..utils.memory import estimate, gigabytes, savings

    settings = memory_settings(configuration, registry)
    if settings is None:
        yield "estimate", "not known for this family"
        return
    expected = estimate(settings)
    for name, num_bytes in expected.parts().items():
        yield name, gigabytes(num_bytes)
    yield "total", f"{gigabytes(expected.total)} (activations are rough)"
    quantizers = configuration.run.model_type == "lora"
    for label, saved in savings(settings, quantizers=quantizers):
        yield "saves", f"{label}: about {gigabytes(saved)}"


def memory_settings(configuration: Configuration, registry: Registry) -> MemorySettings | None:
    """Return what the memory of the run depends on, from the model's config alone."""
    import math

    import torch

    from ..runs.builders import build_family, build_method
    from ..settings.configuration import default_resolution
    from ..utils.memory import MemorySettings

    run = configuration.run
    family = build_family(configuration, registry)
    network = family.empty_network()
    if network is None:
        return None
    base = sum(parameter.numel() for parameter in network.parameters())
    roles = build_method(configuration, registry, family).roles(
        configuration.method, build_method(configuration, registry, family).setup
    )
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

    from ..plugin_api.quantizer import NO_CHANGE

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
