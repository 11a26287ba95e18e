"""What a run's memory depends on, read off its networks, for the message after an allocation failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plugin_api.precision import BASE
from ..utils.memory import MemorySettings

if TYPE_CHECKING:
    from .components import RunComponents


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
