"""The quantizer by bitsandbytes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.quantizer import Quantizer, quantised_layers, replace_module, stored_bytes

if TYPE_CHECKING:
    from torch import nn


class NF4(Quantizer):
    """4-bit normal-float numbers (arXiv 2305.14314), two in a byte, with a scale for each 64 (bitsandbytes)."""

    name = "nf4-bnb"
    packages: ClassVar = {"bitsandbytes": "bitsandbytes>=0.46"}
    bytes_per_weight = 0.5 + 1 / 64

    class Config(Quantizer.Config):
        """Options of 4-bit weights."""

        double_quantisation: bool = True
        """Whether the scales are quantised too: 0.4 bits per weight less."""

    def quantize(self, network: nn.Module, *, device: str, keep: Collection[str] = ()) -> nn.Module:
        """Return `network` with bitsandbytes' 4-bit linear layers; moving a layer to the device packs its weights."""
        from torch import nn

        for name, linear in quantised_layers(network, (nn.Linear,), keep):
            replace_module(network, name, self._packed(linear).to(device))
        return network.to(device)

    def _packed(self, linear: nn.Linear) -> Any:
        from torch import nn

        layers = _layers()
        packed: Any = _linear()(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, device="meta"
        )
        packed.weight = layers.Params4bit(
            linear.weight.detach(),
            requires_grad=False,
            compress_statistics=self.config.double_quantisation,
            quant_type="nf4",
            module=packed,
        )
        packed.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        # on some processors a pass without a gradient repacks the weights, and gives other bits than one with
        packed.support_avx512bf16_for_cpu = False
        return packed

    def stored_bytes(self, network: nn.Module) -> int:
        """Return the bytes of packed weights and of their scales, which are no buffers."""
        layers: list[Any] = [module for module in network.modules() if isinstance(module, _layers().Linear4bit)]
        states = [layer.weight.quant_state.as_dict(packed=False).values() for layer in layers]
        scales = [value for values in states for value in values if hasattr(value, "element_size")]
        return stored_bytes(network) + sum(value.numel() * value.element_size() for value in scales)


def _layers() -> Any:
    from bitsandbytes import nn

    return nn


@functools.cache
def _linear() -> type[Any]:
    class Linear(_layers().Linear4bit):
        """Returns the type that it computes in, as a linear layer does under autocast; its base class the input's."""

        def forward(self, x: Any) -> Any:
            return super().forward(x.to(self.compute_dtype))

    return Linear


@hookimpl
def register_quantizers() -> Sequence[type[Quantizer]]:
    """Return the quantizer of this file."""
    return [NF4]
