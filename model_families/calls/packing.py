"""Latents packed into patches of 2 x 2, each one position of a transformer."""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 4
"""Number of latents that are packed into one position."""


def pack(latents: Tensor) -> Tensor:
    """Pack latents (B, C, h, w) into (B, h/2 w/2, 4 C), patches row by row."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), PATCH * channels)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Unpack (B, h/2 w/2, 4 C) into latents (B, C, h, w)."""
    batch, _, channels = packed.shape
    patches = packed.reshape(batch, height // 2, width // 2, channels // PATCH, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // PATCH, height, width)


def patch_ids(height: int, width: int, *, like: Tensor) -> Tensor:
    """Return (0, row, column) of each patch of latents of `height` and `width`, shape (h/2 w/2, 3)."""
    axes = (torch.arange(edge, device=like.device) for edge in (1, height // 2, width // 2))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3).to(like)


def text_ids(length: int, *, like: Tensor, counted: bool = False) -> Tensor:
    """Return the places (T, 3) of the text's tokens among those of patches: zeros, or (0, i, i) where `counted`."""
    ids = like.new_zeros(length, 3)
    if counted:
        ids[:, 1:] = torch.arange(length, device=like.device).to(like)[:, None]
    return ids
