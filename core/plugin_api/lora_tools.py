"""The part of a family's contract that works on files of LoRAs, without a run: extract, resize, merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Self

from ..errors import UserError
from .precision import Precision


class LoraFormat(StrEnum):
    """Names of a LoRA's tensors: diffusers', or those of kohya's sd-scripts (ComfyUI, AUTOMATIC1111)."""

    DIFFUSERS = "diffusers"
    KOHYA = "kohya"


@dataclass(frozen=True)
class ExtraLora:
    """A further LoRA that is applied beside the student's when images are generated, or to files of LoRAs."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class LowRank:
    """How much of a difference a LoRA keeps.

    Attributes:
        rank: Rank of every layer; with `energy` the largest that a layer may have. None: as many as `energy` wants.
        energy: Share (0-1) of the sum of the squared singular values that each layer keeps, with as small a rank as
            that takes; None: `rank` alone decides.
        device: Device of the singular value decompositions.
    """

    rank: int | None = None
    energy: float | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class LoraTarget:
    """The file that a LoRA is written to.

    Attributes:
        file: The file; it is there completely or not at all.
        dtype: Type of its tensors.
        form: Names of its tensors.
    """

    file: Path
    dtype: Precision = "float32"
    form: LoraFormat = LoraFormat.DIFFUSERS


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA that was written keeps of what it stands for.

    Attributes:
        num_layers: Its layers.
        ranks: The smallest and the largest rank of a layer.
        kept: Norm of the weights' change by the LoRA, over the norm of the whole change of those layers (0-1).
        left_out: What is not in the LoRA, a line each.
    """

    num_layers: int
    ranks: tuple[int, int]
    kept: float
    left_out: Sequence[str] = ()


class LoraTools:
    """What a family can do with LoRAs on files."""

    name: ClassVar[str]

    def extract_lora(
        self, tuned: Self, target: LoraTarget, low_rank: LowRank, *, modules: Sequence[str] | None = None
    ) -> LoraReport:
        """Write the difference of two models as a LoRA, by a singular value decomposition of each layer.

        Args:
            tuned: The other model: this one and the LoRA are together as near to it as the rank allows.
            target: The file to write.
            low_rank: How much is kept.
            modules: Suffixes of the names of the layers; None: those that the family adapts; empty: every linear layer
                and convolution.

        Raises:
            UserError: The models are of different sizes, or do not differ.
        """
        raise UserError(*self._no_tools())

    @classmethod
    def resize_lora(cls, name: str, file: Path, low_rank: LowRank) -> LoraReport:
        """Write a LoRA once more with another rank, in the names and types that it has.

        Args:
            name: The LoRA: a file, a folder or a hub id.
            file: The file to write.
            low_rank: The new rank.

        Raises:
            UserError: It is of a kind that has no rank, as a DoRA or a LoHa.
        """
        raise UserError(*cls._no_tools())

    def combine_loras(self, loras: Sequence[ExtraLora], target: LoraTarget, low_rank: LowRank) -> LoraReport:
        """Write the sum of LoRAs for this model, each at its weight, as one.

        Args:
            loras: LoRAs and their weights.
            target: The file to write.
            low_rank: The rank; without rank and energy the sum of theirs, which loses nothing.

        Raises:
            UserError: One does not fit, or is not a plain LoRA.
        """
        raise UserError(*self._no_tools())

    def export_fused(self, folder: Path) -> None:
        """Write this model, with the LoRAs of ``settings.teacher_lora`` in its weights, as a folder of diffusers.

        Denoiser and text encoders get the type of the frozen weights, the autoencoder keeps that of its file.
        """
        raise UserError(*self._no_tools())

    def stored_precision(self) -> Precision:
        """Return the type in which the files hold the denoiser's weights; float32 for types that are not trained in."""
        return "float32"

    @classmethod
    def _no_tools(cls) -> tuple[str, str]:
        return (
            f"the family {cls.name} has no tools for files of LoRAs",
            "name a family of diffusers' models with --family (`distill plugins list`)",
        )
