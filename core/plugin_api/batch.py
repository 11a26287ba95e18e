"""The batch that the data pipeline gives to a method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Conditioning = dict[str, Tensor]
"""Tensors of shape (B, ...) as the family's network takes them: text embeddings and micro-conditioning."""


@dataclass(frozen=True)
class Trajectories:
    """Where the teacher's sampler began, which points it visited and where it ended: one trajectory per sample of a
    batch.

    Attributes:
        points: Points of the trajectory in the schedule's scaling, shape (B, P, C, h, w); the first is its noise.
        times: Times of these points in the schedule's units, falling, shape (P,): the starts of P even sampler steps.
        data: The scaled latents that the trajectory ended at, shape (B, C, h, w).
        cond: The teacher's conditioning: the prompt, which is never dropped, and the micro-conditioning of an uncropped
            image of that size.
    """

    points: Tensor
    times: Tensor
    data: Tensor
    cond: Conditioning

    @property
    def noise(self) -> Tensor:
        """The noise that the sampler began from, shape (B, C, h, w)."""
        return self.points[:, 0]

    def at(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points with numbers `point` (B,), counted from 0 at the noise, and their times.

        Returns:
            x_t of shape (B, C, h, w) and t of shape (B,) in the schedule's units.
        """
        rows = torch.arange(len(point), device=point.device)
        return self.points[rows, point], self.times[point]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device of the run.

    Attributes:
        latents: Scaled latents, shape (B, C, h, w) (or 5-D for video), or None for methods that run from prompts alone.
        cond: Conditioning of shape (B, ...) each, micro-conditioning included.
        keys: B sample keys that do not depend on where the data lives.
        positions: Position of each sample in the global batch of this optimizer step; random draws depend on it.
        captions: The captions that ``cond`` was made from, for logs and error messages.
        latent_shape: (C, h, w) of one sample's latents, also where `latents` is None.
        trajectories: Trajectories of the teacher for the same captions, or None for methods that need none.
    """

    latents: Tensor | None
    cond: Conditioning
    keys: tuple[str, ...]
    positions: tuple[int, ...]
    captions: tuple[str, ...] = field(default=())
    latent_shape: tuple[int, ...] = ()
    trajectories: Trajectories | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: str, *, non_blocking: bool = True) -> Batch:
        """Return the batch with every tensor on `device`; a tensor that it holds twice is sent once."""
        sent: dict[int, Tensor] = {}

        def send(tensor: Tensor) -> Tensor:
            if id(tensor) not in sent:
                # a copy from memory that is not pinned waits for the device
                source = tensor.pin_memory() if device.startswith("cuda") and tensor.device.type == "cpu" else tensor
                sent[id(tensor)] = source.to(device, non_blocking=non_blocking)
            return sent[id(tensor)]

        def send_all(cond: Conditioning) -> Conditioning:
            return {name: send(value) for name, value in cond.items()}

        trajectories, latents = self.trajectories, None if self.latents is None else send(self.latents)
        if trajectories is not None:
            trajectories = Trajectories(
                send(trajectories.points),
                send(trajectories.times),
                send(trajectories.data),
                send_all(trajectories.cond),
            )
        return replace(self, latents=latents, cond=send_all(self.cond), trajectories=trajectories)
