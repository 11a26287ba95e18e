"""What the data pipeline hands to a method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

Conditioning = dict[str, Tensor]
"""Tensors with the batch in front, as the family's network takes them: text embeddings and micro-conditioning."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device of the run.

    Attributes:
        latents: Scaled latents, shape (B, C, h, w) (or 5-D for video), or None for methods that run from prompts alone.
        cond: Conditioning of shape (B, ...) each, micro-conditioning included.
        keys: B sample keys that do not depend on where the data lives.
        positions: Position of each sample in the global batch of this optimizer step; random draws depend on it.
        captions: The captions that ``cond`` was made from, for logs and error messages.
        latent_shape: (C, h, w) of one sample's latents, whether they are there or not.
    """

    latents: Tensor | None
    cond: Conditioning
    keys: tuple[str, ...]
    positions: tuple[int, ...]
    captions: tuple[str, ...] = field(default=())
    latent_shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: str, *, non_blocking: bool = True) -> Batch:
        """The same batch with every tensor on `device`."""

        def send(tensor: Tensor) -> Tensor:
            # a copy from memory that is not pinned waits for the device
            source = tensor.pin_memory() if device.startswith("cuda") and tensor.device.type == "cpu" else tensor
            return source.to(device, non_blocking=non_blocking)

        latents = None if self.latents is None else send(self.latents)
        return replace(self, latents=latents, cond={name: send(value) for name, value in self.cond.items()})
