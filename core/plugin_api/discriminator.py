"""The discriminator of methods with an adversarial term: the settings of its heads, its role, its R1 penalty."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from ..diffusion.adversarial import HeadKind, HeadLevels, R1Kind, R1Weight, r1_penalty
from .method import Role

if TYPE_CHECKING:
    from torch import Tensor

    from .context import Context

DISCRIMINATOR = "discriminator"


class DiscriminatorSettings(BaseModel):
    """Settings of heads that tell real from generated samples; methods derive their own from it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    discriminator_learning_rate: float | None = Field(1e-5, gt=0, le=1)
    """Learning rate of the discriminator's heads; null: the run's."""
    heads: HeadKind = "places"
    head_levels: HeadLevels = "all"
    r1_weight: R1Weight = 0.0
    r1: R1Kind = "exact"

    def discriminator(self, **optimizer: Any) -> Role:
        """Return the role of the heads.

        Args:
            optimizer: Settings of the role's optimizer in the method's paper: fields of :class:`.method.Role`.
        """
        return Role(
            DISCRIMINATOR, trains="head", learning_rate=self.discriminator_learning_rate, heads=self.heads,
            head_levels=self.head_levels, **optimizer,
        )  # fmt: skip

    def r1_term(self, context: Context, real: Sequence[Tensor]) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Return the weighed R1 penalty (B,) at real samples, 0 where there is none, and its metrics.

        Args:
            context: The micro-batch's.
            real: Features of the real samples, each (B, C_k, h_k, w_k).
        """
        if self.r1_weight == 0:
            return 0.0, {}
        heads = partial(context.logits, DISCRIMINATOR)
        penalty = r1_penalty(heads, real, kind=self.r1, draw=context.rng.randn)
        return self.r1_weight * penalty, {"discriminator/r1": penalty.detach().mean()}
