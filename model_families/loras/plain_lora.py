"""LoRAs in the formats that diffusers reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files.reading import quiet_libraries
from .lora_files import lora_file

if TYPE_CHECKING:
    from ..files.architecture import Architecture


@dataclass(frozen=True)
class Lora:
    """One LoRA as diffusers reads it.

    Attributes:
        name: As the user wrote it.
        weight: Factor of its contribution.
        state: Tensors by name, prefixed with the part that they change: ``unet.``, ``text_encoder_2.``.
        alphas: Alphas by tensor name, for files that carry them (kohya), or None.
        metadata: diffusers' adapter metadata of the file (rank, alpha, targets), or None.
    """

    name: str
    weight: float
    state: Mapping[str, Tensor]
    alphas: Mapping[str, float] | None
    metadata: Mapping[str, Any] | None

    def has(self, prefix: str) -> bool:
        """Return True if it changes the component `prefix`."""
        return any(key.startswith(f"{prefix}.") for key in self.state)

    def num_layers(self, prefix: str) -> int:
        """Return the number of layers of the component `prefix` that it changes."""
        inner = {key.partition(".lora")[0].partition("_lora.")[0] for key in self.state if key.startswith(f"{prefix}.")}
        return len({name.removesuffix(".alpha") for name in inner})


def scaled(weight: Tensor, scale: float, *, dtype: torch.dtype) -> Tensor:
    """Return the weight times a scale as `dtype`, on the CPU, rounded once."""
    return (weight.detach().cpu().double() * scale).to(dtype)


def scaled_dtype(dtype: torch.dtype, scale: float) -> torch.dtype:
    """Return the type of scaled weights: float32 for half precision, unless a power of two scales it exactly."""
    exact = math.frexp(scale)[0] == 0.5
    return dtype if exact else torch.promote_types(dtype, torch.float32)


def read_by_diffusers(name: str, weight: float, architecture: Architecture, config: Mapping[str, Any]) -> Lora:
    """Read a LoRA in diffusers' or kohya's format as diffusers does, for a denoiser of `config`."""
    with quiet_libraries():
        read: Any = architecture.pipeline_class().lora_state_dict(
            str(lora_file(name)),
            unet_config=SimpleNamespace(**config),
            return_alphas=True,
            return_lora_metadata=True,
            use_safetensors=True,
        )
    state, *alphas, metadata = read  # some pipelines know no alphas
    return Lora(name, weight, state, alphas[0] if alphas else None, metadata)
