r"""Adversarial terms on features of a diffusion network.

Heads D_k read features h_k of noised samples, from inside a network that the discriminator shares with the run.
With logits l = D(h), averaged over heads and positions,

    hinge       L_D = relu(1 - l_real) + relu(1 + l_fake)        L_G = relu(1 - l_fake)
    softplus    L_D = softplus(-l_real) + softplus(l_fake)       L_G = softplus(-l_fake)

References:
    Sauer et al., Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation, arXiv 2403.12015.
    Yin et al., Improved Distribution Matching Distillation, arXiv 2405.14867.
    Wang et al., Phased Consistency Models, arXiv 2405.18407.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

AdversarialLoss = Literal["hinge", "softplus"]
POSITIONS = 4
"""Logits per edge: every level gives at most 4 x 4 logits, so that none outweighs the others."""
HIDDEN = 64


class Heads(nn.Module):
    """A small convolutional head for each level of features.

    Args:
        channels: C_k of each level.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_head(width) for width in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the logits (B, K) of features, each of shape (B, C_k, h_k, w_k)."""
        dtype = next(self.parameters()).dtype  # bf16 heads of a bf16 optimizer may look at an fp32 network
        found = [head(_pooled(level).to(dtype)) for head, level in zip(self.levels, features, strict=True)]
        return torch.cat([logits.flatten(1) for logits in found], dim=1)


def _head(channels: int) -> nn.Sequential:
    hidden = min(HIDDEN, max(8, channels))
    return nn.Sequential(
        nn.GroupNorm(1, channels), nn.Conv2d(channels, hidden, 3, padding=1), nn.SiLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, 1, 1),
    )  # fmt: skip


def _pooled(level: Tensor) -> Tensor:
    height, width = level.shape[-2:]
    pooled = nn.functional.adaptive_avg_pool2d(level, (min(POSITIONS, height), min(POSITIONS, width)))
    # on CPUs GroupNorm's backward crashes for channels-last inputs that ask for no gradient (PyTorch 2.13);
    # contiguous() leaves the strides of a 1 x 1 level as they are
    return pooled.clone(memory_format=torch.contiguous_format)


def discriminator_loss(real: Tensor, fake: Tensor, *, kind: AdversarialLoss) -> Tensor:
    """Return the loss L_D of the heads, shape (B,); see the module's equations.

    Args:
        real: Logits of real samples, shape (B, K).
        fake: Logits of generated samples, shape (B, K).
        kind: ``hinge`` or ``softplus``.
    """
    if kind == "hinge":
        return (1 - real).relu().mean(1) + (1 + fake).relu().mean(1)
    softplus = nn.functional.softplus
    return softplus(-real).mean(1) + softplus(fake).mean(1)


def generator_loss(fake: Tensor, *, kind: AdversarialLoss) -> Tensor:
    """Return the student's loss L_G, shape (B,), from logits of its samples `fake`, shape (B, K)."""
    return ((1 - fake).relu() if kind == "hinge" else nn.functional.softplus(-fake)).mean(1)
