"""What the engine offers a method for one micro-batch: predictions, guidance and named random draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .diffusion.prediction import Prediction, guide
from .random import Draws

if TYPE_CHECKING:
    from .batch import Conditioning
    from .diffusion.schedule import Grid, Schedule
    from .family import ModelFamily
    from .networks import Networks


@dataclass(frozen=True)
class Runtime:
    """What stays the same over a run."""

    family: ModelFamily
    networks: Networks
    seed: int
    device: torch.device
    autocast_dtype: torch.dtype | None = None
    grids: dict[int, Grid] = field(default_factory=dict)
    """Grids on the device by number of steps: making one anew would copy to the device at every step."""


class Context:
    """One micro-batch's view of the run.

    Args:
        runtime: Family, networks, seed and device.
        step: The optimizer step that the draws belong to.
        positions: Position of each sample in the global batch.
    """

    def __init__(self, runtime: Runtime, *, step: int = 0, positions: Sequence[int] = ()) -> None:
        self._runtime = runtime
        self.draws = Draws(runtime.seed, step, positions, runtime.device)
        self.schedule: Schedule = runtime.family.schedule
        self.prediction_type = runtime.family.prediction_type

    @property
    def device(self) -> torch.device:
        """Where the batch lives."""
        return self._runtime.device

    def at(self, step: int, positions: Sequence[int]) -> Context:
        """The same run seen from another micro-batch."""
        return Context(self._runtime, step=step, positions=positions)

    def grid(self, num_steps: int) -> Grid:
        """The schedule's grid with `num_steps` steps, on the device."""
        grids = self._runtime.grids
        if num_steps not in grids:
            grids[num_steps] = self.schedule.grid(num_steps).to(self.device)
        return grids[num_steps]

    def predict(
        self, role: str, x_t: Tensor, t: Tensor, cond: Conditioning, *, guidance: Tensor | None = None
    ) -> Prediction:
        """The role's prediction at `x_t` (B, ...) and time `t` (B,).

        Args:
            role: A role that the method declared.
            x_t: Noised latents.
            t: Times in the schedule's units.
            cond: Conditioning, B in front.
            guidance: The paper's w (guidance scale minus one), shape (B,), for networks with a guidance embedding.
        """
        runtime = self._runtime
        time = self.schedule.network_time(t)
        with runtime.networks.use(role) as network, self._autocast():
            output = runtime.family.predict(network, x_t, time, cond, guidance=guidance)
        return Prediction(output, x_t, t, self.schedule, self.prediction_type)

    def _autocast(self) -> torch.autocast:
        dtype = self._runtime.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def uncond(self, cond: Conditioning) -> Conditioning:
        """The unconditional counterpart of `cond`; what that is, the family decides."""
        return self._runtime.family.uncond(cond)

    def teacher_cfg(self, x_t: Tensor, t: Tensor, cond: Conditioning, scale: Tensor) -> Prediction:
        """The teacher with classifier-free guidance, both halves in one batched call.

        Args:
            x_t: Noised latents, shape (B, ...).
            t: Times, shape (B,).
            cond: Conditioning, B in front.
            scale: g of uncond + g (cond - uncond), shape (B,).
        """
        uncond = self.uncond(cond)
        both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
        joint = self.predict("teacher", torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        with_prompt, without = (Prediction(half, x_t, t, self.schedule, joint.kind) for half in joint.output.chunk(2))
        return guide(with_prompt, without, scale)
