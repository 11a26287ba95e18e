"""Quantizers by torchao: 8-bit whole and floating-point weights, and 4-bit weights in groups.

torchao's own layers give autograd the unpacked weight, which is then kept for the backward pass, and its 4-bit kernels
have no backward pass at all. So its numbers are used in layers of our own (:mod:`._packed`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.quantizer import Quantizer, quantised_layers, replace_module

if TYPE_CHECKING:
    from torch import nn


class Torchao(Quantizer):
    """Replaces the linear layers, one at a time on the device; abstract."""

    packages: ClassVar = {"torchao": "torchao>=0.17"}
    forward_ad = True

    @abstractmethod
    def replaced(self, linear: nn.Linear) -> nn.Module | None:
        """Return the replacement of `linear`, or None where it stays."""

    def quantize(self, network: nn.Module, *, device: str, keep: Collection[str] = ()) -> nn.Module:
        """Return `network` with packed weights in its linear layers."""
        from torch import nn

        for name, linear in quantised_layers(network, (nn.Linear,), keep):
            packed = self.replaced(linear.to(device))
            if packed is not None:
                replace_module(network, name, packed)
        return network.to(device)


class Int8Torchao(Torchao):
    """8-bit whole numbers with a scale for each row (torchao)."""

    name = "int8-torchao"

    def replaced(self, linear: nn.Linear) -> nn.Module:
        """Return a layer with the numbers of an ``Int8Tensor``."""
        from torchao.quantization import Int8Tensor, PerRow

        from ._packed import ScaledLinear

        packed = Int8Tensor.from_hp(linear.weight.detach(), PerRow())
        return ScaledLinear(linear, packed.qdata, packed.scale)


class Fp8Torchao(Torchao):
    """8-bit floating-point numbers (e4m3) with a scale for each row (torchao)."""

    name = "fp8-torchao"

    def replaced(self, linear: nn.Linear) -> nn.Module:
        """Return a layer with the numbers of a ``Float8Tensor``."""
        from torchao.quantization import Float8Tensor, PerRow

        from ._packed import ScaledLinear

        packed = Float8Tensor.from_hp(linear.weight.detach(), granularity=PerRow())
        return ScaledLinear(linear, packed.qdata, packed.scale)


class Int4Torchao(Torchao):
    """4-bit whole numbers with a scale and a zero point for each group of weights (torchao's numbers, packed here)."""

    name = "int4-torchao"
    bytes_per_weight = 0.5 + 3 / 64

    class Config(Torchao.Config):
        """Options of 4-bit weights."""

        group_size: Literal[16, 32, 64, 128, 256] = 64
        """Weights that share a scale; a layer whose inputs it does not divide stays as it is."""

    def replaced(self, linear: nn.Linear) -> nn.Module | None:
        """Return a layer with two weights in a byte."""
        from ._packed import Int4Linear

        group_size = self.config.group_size
        return None if linear.in_features % group_size else Int4Linear(linear, group_size=group_size)


@hookimpl
def register_quantizers() -> Sequence[type[Quantizer]]:
    """Return the quantizers of this file."""
    return [Int8Torchao, Fp8Torchao, Int4Torchao]
