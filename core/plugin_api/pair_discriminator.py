r"""A discriminator of where a solver's steps end, given where they start.

It is the first half of a diffusion network, E, which begins as the teacher and is trained, with heads on its features.
For a step from x_t to x_s, with prompt c,

    conditional   l(x_s) = D(E(x_s, s, c), E(x_t, t, c))       features joined along the channels
    relaxed       l(x_s) = D'(E(x_s, s, c))

    L_D = softplus(-l(x_s)) + softplus(l(x^_s)),        L_G = softplus(-l(x^_s))

where x_s is the teacher's end and x^_s the student's.

References:
    Lin et al., SDXL-Lightning: Progressive Adversarial Diffusion Distillation, arXiv 2402.13929.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.adversarial import HeadKind, HeadLevels, discriminator_loss, generator_loss
from .batch import Conditioning
from .context import Context
from .method import ModelType, Role, Update

ENCODER, PAIR_HEADS, RELAXED_HEADS = "discriminator_encoder", "pair_heads", "relaxed_heads"
"""Roles of the discriminator: the network whose features it reads, and the heads of each objective."""
BETAS = (0.0, 0.99)
"""Those of its Adam in the paper, which is without weight decay."""


def pair_roles(
    names: Sequence[str],
    model_type: ModelType,
    *,
    heads: HeadKind,
    head_levels: HeadLevels,
    learning_rate: float | None,
) -> list[Role]:
    """Return the roles of a discriminator; none where `names` is empty.

    Args:
        names: Those of PAIR_HEADS and RELAXED_HEADS that are trained.
        model_type: How the encoder is trained: as an adapter on the shared base, or as a copy.
        heads: Kind of the heads.
        head_levels: Features that they read.
        learning_rate: That of encoder and heads; None is the run's.
    """
    inputs = {PAIR_HEADS: 2, RELAXED_HEADS: 1}
    own: dict[str, Any] = {"learning_rate": learning_rate, "betas": BETAS, "weight_decay": 0.0}
    shape: dict[str, Any] = {"heads": heads, "head_levels": head_levels}
    found = [Role(name, trains="head", head_inputs=inputs[name], **shape, **own) for name in names]
    return [Role(ENCODER, trains=model_type, features_only=True, **own), *found] if found else []


class PairDiscriminator:
    """The discriminator at one step: it tells ends that the teacher made from ends that the student made.

    Args:
        context: The run as the micro-batch sees it.
        cond: Conditioning, each tensor of shape (B, ...).
        x_t: Starts of the steps, shape (B, ...).
        t: Their times, shape (B,).
        s: Times of the ends, shape (B,).
        relaxed: Whether it sees the ends alone.
    """

    def __init__(
        self, context: Context, cond: Conditioning, x_t: Tensor, t: Tensor, s: Tensor, *, relaxed: bool
    ) -> None:
        self._context, self._cond, self._x_t, self._t, self._s = context, cond, x_t, t, s
        self._relaxed, self._heads = relaxed, RELAXED_HEADS if relaxed else PAIR_HEADS

    def generator_loss(self, x_hat: Tensor) -> Tensor:
        """Return the student's loss (B,) of its ends `x_hat` (B, ...)."""
        features = self._context.features(ENCODER, x_hat, self._s, self._cond)
        if not self._relaxed:
            with torch.no_grad():
                starts = self._context.features(ENCODER, self._x_t, self._t, self._cond)
            features = _joined(features, starts)
        return generator_loss(self._context.logits(self._heads, features), kind="softplus")

    def updates(self, x_s: Tensor, x_hat: Tensor) -> Iterator[Update]:
        """Yield the updates of the encoder and of the heads, from one pass over the teacher's and the student's ends.

        Args:
            x_s: Ends that the teacher made, shape (B, ...).
            x_hat: Ends that the student made, detached, shape (B, ...).
        """
        seen = [(x_s, self._s), (x_hat, self._s), *([] if self._relaxed else [(self._x_t, self._t)])]
        cond = {name: torch.cat([value] * len(seen)) for name, value in self._cond.items()}
        samples, times = (torch.cat(parts) for parts in zip(*seen, strict=True))
        levels = self._context.features(ENCODER, samples, times, cond)
        real, fake, *starts = (list(each) for each in zip(*(level.chunk(len(seen)) for level in levels), strict=True))
        pair = [_joined(ends, *starts) for ends in (real, fake)]
        yield Update(ENCODER, self._loss(*pair).mean())
        yield Update(self._heads, self._loss(*([level.detach() for level in ends] for ends in pair)).mean())

    def _loss(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
        judged = [self._context.logits(self._heads, features) for features in (real, fake)]
        return discriminator_loss(*judged, kind="softplus")


def _joined(*features: Sequence[Tensor]) -> list[Tensor]:
    """Return features of several samples joined along the channels, each level (B, n C_k, h_k, w_k)."""
    return [torch.cat(levels, dim=1) for levels in zip(*features, strict=True)]
