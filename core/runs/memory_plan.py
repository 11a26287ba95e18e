"""A run's memory: a warning before it begins, what its networks need, and the hint after an allocation failed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..plugin_api.precision import BASE
from ..utils.memory import (
    MemorySettings,
    free_memory_bytes,
    gigabytes,
    is_out_of_memory,
    out_of_memory_hint,
    savings_lines,
    scaled,
)
from ..utils.process_memory import process_peak, process_total
from ..utils.strategies import Division
from .activation_memory import run_activations
from .optimizer_memory import state_bytes
from .planned_memory import decoding_bytes, idle_parameters, of_phases, of_whole_networks, stored_bytes, units

if TYPE_CHECKING:
    from .components import RunComponents


def memory_warning(settings: MemorySettings, device: str, *, quantizers: bool, division: Division) -> str | None:
    """Return a warning where a run is not expected to fit into the memory that is free; None where it is.

    Args:
        settings: Of the run.
        device: The one that it trains on.
        quantizers: Whether the base can be quantised.
        division: The way in which its processes share the networks.
    """
    measure = partial(process_total, division=division)
    expected, free = process_peak(settings, division), free_memory_bytes(device)
    if expected <= free:
        return None
    fixed = process_peak(scaled(settings, 0, latent_pixels=0), division)
    sure = "it will not fit" if fixed > free else "it may not fit (activations are estimated)"
    each = " on each process" if division.num_processes > 1 else ""
    return "\n".join(
        [
            f"this run is estimated at {gigabytes(expected)} of memory{each}, and {gigabytes(free)} are free on "
            f"{device}: {sure}. What would save how much:",
            *savings_lines(settings, quantizers=quantizers, measure=measure),
        ]
    )


def explain_memory(run: RunComponents, error: BaseException) -> Iterator[str]:
    """Yield the hint of what would save how much, where `error` came from an allocation that failed."""
    if not is_out_of_memory(error):
        return
    loaded = "networks" in vars(run)
    settings = memory_settings(run) if loaded else run.planned_memory and counted(run, run.planned_memory)
    if settings is not None:
        measure = partial(process_total, division=division_of(run))
        yield out_of_memory_hint(settings, quantizers=can_be_quantised(run), measure=measure)


def counted(run: RunComponents, settings: MemorySettings) -> MemorySettings:
    """Return the settings with activations counted, which takes a moment, where the rough ones leave it open whether
    the run fits.
    """
    free = free_memory_bytes(str(run.processes.device))
    if process_peak(replace(settings, batch=2 * settings.batch), division_of(run)) <= free:  # a factor of two
        return settings
    return replace(settings, kept=run_activations(run.config, run.family))


def division_of(run: RunComponents) -> Division:
    """Return the way in which the run's processes share its networks."""
    return Division(run.strategy.settings, run.processes.world_size)


def can_be_quantised(run: RunComponents) -> bool:
    """Return True if a quantised base goes with this run."""
    return run.strategy.name == "replicate"


def memory_settings(run: RunComponents) -> MemorySettings:
    """The settings of a run whose networks are loaded."""
    settings, networks = run.settings, run.networks
    own = {role: sum(p.numel() for p in networks.named_parameters(role).values()) for role in networks.roles}
    trained = [p for role in networks.trained_roles() for p in networks.parameters(role)]
    frozen = [p for p in networks.base.parameters() if not p.requires_grad]
    idle = idle_parameters(networks.roles, run.family.empty_network(), run.family)
    width, height = run.resolution
    scale = run.family.scale_factor
    averages = [name for name, role in networks.roles.items() if role.source] + ["student"] * settings.use_ema
    item = trained[0].element_size()
    stored = run.family.settings.precision.stored(BASE)
    num_frozen = sum(p.numel() for p in frozen)
    base_bytes = sum(p.numel() * p.element_size() for p in frozen) / num_frozen
    if stored is not None:  # packed numbers are not parameters one by one
        num_frozen = stored[0] // (4 if settings.mixed_precision == "no" else 2)
        base_bytes = stored[1] / num_frozen
    largest, outside = units(run.family, networks.base)
    return MemorySettings(
        base_parameters=num_frozen,
        trained_parameters=sum(p.numel() for p in trained),
        idle_parameters=sum(idle.values()),
        largest_role=max(own[role] - idle.get(role, 0) for role in networks.trained_roles()),
        latent_pixels=(width // scale) * (height // scale),
        batch=run.config.largest_batch,
        base_bytes=base_bytes,
        compute_bytes=4 if settings.mixed_precision == "no" else 2,
        trained_bytes=item,
        optimizer_bytes=state_bytes(run.optimizer_plugin),
        averaged_parameters=sum(own[name] for name in averages),
        student_parameters=own["student"],
        quantisable=all(role.trains != "full" for role in networks.roles.values()),
        full_student=settings.model_type == "full",
        staged=settings.checkpoint_async and str(run.processes.device) == "cpu",
        gradient_checkpointing=settings.gradient_checkpointing,
        activation_offload=settings.activation_offload,
        kept=run_activations(run.config, run.family),
        decoding_bytes=decoding_bytes(run.method, run.family, (width, height)),
        own_decoder=settings.pixel_decoder is None,
        auxiliary_bytes=sum(stored_bytes(role) for role in networks.roles.values()),
        **of_whole_networks(networks.roles, own, averages),
        **of_phases(run.config, run.family, run.family.empty_network(), student=own["student"]),
        largest_unit=largest,
        outside_units=outside,
    )
