"""Layers with LoRA, as training calls them: an adapter is added by the matrix product itself, or to the weight before.

    y = W x + s B (A x)            in half precision, and where memory lacks room
    y = (W + s B A) x              in fp32 and above

peft's own layers scale the product and add it in two more passes over the output, forward and backward, and take its
second factor for a convolution of a 1x1 kernel. These subclasses are peft's layers in everything else. The gradient of
the factors in a pass on merged weights is in `merged_products.py`.

Merged weights are for fp32 alone. A weight of half precision keeps 8 or 11 bits, and a LoRA changes it by less than the
last one for most of a training: the merged weight would be rounded to the teacher's, and the adapter would be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad

from .merged_products import merged_conv2d, merged_linear

WIDE = (torch.float32, torch.float64)


class _Direct:
    """What both kinds share; mixed into a layer of peft, whose attributes it reads."""

    merged_weight: Tensor | None
    """The sum of the base's weight and of an adapter's product, while passes run on it."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what peft's layer does, shape (B, ..., D_out) or (B, C_out, h', w')."""
        merged = self._merged_for(x)
        if merged is not None and not torch.is_grad_enabled():
            return self._base_output(x, merged)
        adapter = self._sole_adapter(kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if merged is not None and not torch.compiler.is_compiling() and forward_ad._current_level < 0:
            factors = (each[adapter].weight.to(merged.dtype) for each in (self.lora_A, self.lora_B))
            return self._merged_output(x, merged, *factors, self.scaling[adapter])
        output, scale = self.base_layer(x), self.scaling[adapter]
        up, inner = self.lora_B[adapter], self.lora_A[adapter](self._input(adapter, x))
        if output.dtype != inner.dtype:
            return (output + up(inner) * scale).to(output.dtype)
        factor = up.weight
        if factor.dtype != inner.dtype and not torch.is_autocast_enabled(x.device.type):
            factor = factor.to(inner.dtype)  # in fp32 throughout, weights are cast as their module is called
        return self._with_product(output, inner, factor, scale)

    def _merged_for(self: Any, x: Tensor) -> Tensor | None:
        """Return the merged weight; None where there is none, or where it would be rounded to half precision."""
        merged = self.merged_weight
        rounded = merged is not None and (x.dtype != merged.dtype or torch.is_autocast_enabled(x.device.type))
        return None if rounded else merged

    def _sole_adapter(self: Any, kwargs: dict[str, Any]) -> str | None:
        """Return the adapter that is on; None where peft's own forward has to decide."""
        if self._disable_adapters or kwargs or self.merged or len(self._active_adapter) != 1:
            return None
        (adapter,) = self._active_adapter
        plain = adapter in self.lora_A and adapter not in self.lora_variant and self.lora_B[adapter].bias is None
        return adapter if plain else None

    def _input(self: Any, adapter: str, x: Tensor) -> Tensor:
        """Return what the first factor reads, in its type, or as it is where autocast would only cast it back."""
        dropout = self.lora_dropout[adapter]
        if isinstance(dropout, nn.Identity) and torch.is_autocast_enabled(x.device.type):
            return x
        return dropout(self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype))


class DirectLinear(_Direct, lora.Linear):
    """A linear layer with LoRA."""

    def _base_output(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, self.base_layer.bias)

    def _merged_output(self: Any, x: Tensor, merged: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        return merged_linear(x, merged, self.base_layer, down, up, scale)

    @staticmethod
    def _with_product(output: Tensor, inner: Tensor, up: Tensor, scale: float) -> Tensor:
        return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=scale).view(output.shape)


class DirectConv2d(_Direct, lora.Conv2d):
    """A convolution with LoRA, whose second factor has a 1x1 kernel."""

    def _base_output(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        return self.base_layer._conv_forward(x, weight, self.base_layer.bias)

    def _merged_output(self: Any, x: Tensor, merged: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        return merged_conv2d(x, merged, self.base_layer, down, up, scale)

    @staticmethod
    def _with_product(output: Tensor, inner: Tensor, up: Tensor, scale: float) -> Tensor:
        if output.is_contiguous(memory_format=torch.channels_last):
            rows, inner = (tensor.permute(0, 2, 3, 1) for tensor in (output, inner))
            added = torch.addmm(rows.flatten(0, 2), inner.flatten(0, 2), up.flatten(1).t(), alpha=scale)
            return added.view(rows.shape).permute(0, 3, 1, 2)
        factor = up.flatten(1).expand(len(output), -1, -1)
        return torch.baddbmm(output.flatten(2), factor, inner.flatten(2), alpha=scale).view(output.shape)


DIRECT: dict[type, type] = {lora.Linear: DirectLinear, lora.Conv2d: DirectConv2d}
PLAIN = (nn.Linear, nn.Conv2d)


def make_direct(layers: Iterable[Any]) -> None:
    """Turn peft's layers into those of this module; kinds that it has none for (quantised ones, say) stay."""
    for layer in layers:
        kind = DIRECT.get(type(layer))
        if kind is not None:
            layer.__class__ = kind
            layer.merged_weight = None  # of its own from the start: a compiler looks where an attribute lies


class MergedWeights:
    """Copies of the base's weights with an adapter's product added, one set for each adapter, made when first needed.

    The base's own weights are never touched.

    Args:
        layers: Those that carry adapters.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._sets: dict[str, list[tuple[Any, Tensor]]] = {}
        self._fresh: set[str] = set()

    def forget(self, adapter: str | None = None) -> None:
        """Make the set of `adapter`, or every set, again before it is used next: the adapter has changed.

        Everything that changes adapters has to say so; the counters of tensors do not tell of fused optimizers.
        """
        self._fresh -= self._sets.keys() if adapter is None else {adapter}

    def bytes_of(self, adapter: str) -> int:
        """Return the bytes that the set of `adapter` takes, beyond what it holds by now."""
        return 0 if adapter in self._sets else sum(layer.base_layer.weight.nbytes for layer in self._merging(adapter))

    def _merging(self, adapter: str) -> list[Any]:
        """Return the layers that run on merged weights for `adapter`; the others run as ever."""
        return [layer for layer in self._layers if adapter in layer.lora_A and _mergeable(layer, adapter)]

    @torch.no_grad()
    def use(self, adapter: str) -> None:
        """Let the layers run on the merged weights of `adapter`, until :meth:`leave`."""
        if adapter not in self._sets:
            self._sets[adapter] = [(layer, _like(layer.base_layer.weight)) for layer in self._merging(adapter)]
        if adapter not in self._fresh:
            for layer, merged in self._sets[adapter]:
                _merge(layer, adapter, merged)
            self._fresh.add(adapter)
        for layer, merged in self._sets[adapter]:
            layer.merged_weight = merged

    def leave(self, adapter: str) -> None:
        """Let the layers run on the base's weights again."""
        for layer, _ in self._sets[adapter]:
            layer.merged_weight = None


def _mergeable(layer: Any, adapter: str) -> bool:
    """Return True if the sum of both weights gives what the layer does: no dropout between them, nothing packed."""
    base = layer.base_layer
    return (
        type(layer) in DIRECT.values()
        and type(base) in PLAIN
        and base.weight.dtype in WIDE
        and isinstance(layer.lora_dropout[adapter], nn.Identity)
        and adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and getattr(base, "groups", 1) == 1
        and getattr(base, "padding_mode", "zeros") == "zeros"
        and not isinstance(getattr(base, "padding", 0), str)
    )


def _like(weight: Tensor) -> Tensor:
    """Return an empty tensor whose rows, one for each output of `weight`, lie one after the other in memory."""
    last = weight.dim() > 2 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(weight, memory_format=torch.channels_last if last else torch.contiguous_format)


def _merge(layer: Any, adapter: str, merged: Tensor) -> None:
    """Write the base's weight plus the adapter's product into `merged`, made by :func:`_like`."""
    down, up = (factors[adapter].weight.to(merged.dtype) for factors in (layer.lora_A, layer.lora_B))
    base, up = layer.base_layer.weight, up.flatten(1)
    if not merged.is_contiguous():
        base, down, merged = (weight.permute(0, 2, 3, 1) for weight in (base, down, merged))
    torch.addmm(base.flatten(1), up, down.flatten(1), alpha=layer.scaling[adapter], out=merged.view(len(merged), -1))


def without_weights(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the names of modules that `targets`, suffixes of names, mean and on which no adapter can lie.

    They have no weights of their own, as an activation that is numbered like a layer elsewhere, or are lists of layers.
    """
    named = ((name, one) for name, one in network.named_modules() if name.endswith(tuple(f".{t}" for t in targets)))
    return [name for name, one in named if isinstance(one, nn.ModuleList) or next(one.parameters(), None) is None]
