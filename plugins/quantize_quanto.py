"""The quantizer by optimum-quanto.

Its numbers are used in other layers than its own: on a CPU those of linear weights refuse a bfloat16 input that is not
contiguous, they have no forward-mode derivative, and peft would make the adapter of a convolution of its class.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.quantizer import Quantizer, quantised_layers, replace_module

if TYPE_CHECKING:
    from torch import nn


class Int8Quanto(Quantizer):
    """8-bit whole numbers with a scale for each row or filter, convolutions too (optimum-quanto)."""

    name = "int8-quanto"
    packages: ClassVar = {"optimum.quanto": "optimum-quanto>=0.2.7"}
    layers = ("Linear", "Conv2d")

    def quantize(self, network: nn.Module, *, device: str, keep: Collection[str] = ()) -> nn.Module:
        """Return `network` with quanto's weights in its linear layers and convolutions."""
        from optimum.quanto import freeze, qint8, quantize
        from torch import nn

        from ._packed import ScaledLinear

        layers = quantised_layers(network, (nn.Linear, nn.Conv2d), keep)
        quantize(network, weights=qint8, include=[name for name, _ in layers])
        freeze(network)
        for name, layer in layers:
            quantised: Any = network.get_submodule(name)
            weight = quantised.weight.detach()
            layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), quantised.bias
            if isinstance(layer, nn.Linear):
                numbers, scale = (getattr(weight, part) for part in weight.__tensor_flatten__()[0])
                layer = ScaledLinear(layer, numbers, scale)
            replace_module(network, name, layer)
        return network.to(device)


@hookimpl
def register_quantizers() -> Sequence[type[Quantizer]]:
    """Return the quantizer of this file."""
    return [Int8Quanto]
