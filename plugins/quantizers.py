"""Quantizers of frozen networks, each from a library: torchao."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar

from ..core.hookspecs import hookimpl
from ..core.quantizer import Quantizer, is_kept

if TYPE_CHECKING:
    from torch import nn


class Int8Torchao(Quantizer):
    """8-bit whole-number weights with a scale per row, by torchao."""

    name = "int8-torchao"
    packages: ClassVar = {"torchao": "torchao>=0.17"}

    def quantize(self, network: nn.Module, *, device: str, keep: Collection[str] = ()) -> nn.Module:
        """`network` with torchao's int8 weights in its linear layers."""
        from torch import nn
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(
            network,
            Int8WeightOnlyConfig(),
            lambda module, name: isinstance(module, nn.Linear) and not is_kept(name, keep),
            device=device,  # pyright: ignore[reportArgumentType]  # it takes texts as well
        )
        return network.to(device)


@hookimpl
def register_quantizers() -> Sequence[type[Quantizer]]:
    """The quantizers of this module."""
    return [Int8Torchao]
