"""What a run's memory depends on, read off its networks, for the message after an allocation failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .engine.memory import MemorySettings

if TYPE_CHECKING:
    from .run import Run


def memory_settings(run: Run) -> MemorySettings:
    """The settings of a run whose networks are loaded."""
    settings, networks = run.settings, run.networks
    trained = [p for role in networks.trained_roles() for p in networks.parameters(role)]
    frozen = [p for p in networks.base.parameters() if not p.requires_grad]
    width, height = run.resolution
    scale = run.family.scale_factor
    averages = sum(role.source is not None for role in networks.roles.values()) + settings.use_ema
    item = trained[0].element_size()
    return MemorySettings(
        base_parameters=sum(p.numel() for p in frozen),
        trained_parameters=sum(p.numel() for p in trained),
        latent_pixels=(width // scale) * (height // scale),
        batch=run.config.largest_batch,
        base_bytes=frozen[0].element_size(),
        compute_bytes=4 if settings.mixed_precision == "no" else 2,
        trained_bytes=item,
        optimizer_bytes=2 * item,
        num_averages=averages,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
