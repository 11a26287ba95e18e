"""Products with a weight that a LoRA was added to, and the gradients of the LoRA's factors.

    y = (W + s B A) x

Forward and towards x that is one product where the LoRA as it is takes three. The factors' gradients come by either of

    dB = s (dy^T x) A^T,  dA = s B^T (dy^T x)        through the gradient of the whole weight
    dB = s dy^T (A x),    dA = s (dy B)^T x          through the rank

whichever has fewer multiplications: the first where the rank is not small beside the layer's width. In exact
arithmetic all are what autograd makes of the LoRA as it is.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight


def merged_linear(x: Tensor, merged: Tensor, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return the layer's output, (B, ..., D_out).

    Args:
        x: Input, shape (B, ..., D_in).
        merged: base.weight + scale * up @ down, (D_out, D_in); not differentiated.
        base: Frozen.
        down: First factor, (R, D_in).
        up: Second factor, (D_out, R).
        scale: Of their product.
    """
    return _MergedLinear.apply(x, down, up, merged, base.weight, base.bias, scale)


def merged_conv2d(x: Tensor, merged: Tensor, base: nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return the layer's output, (B, C_out, h', w').

    Args:
        x: Input, shape (B, C_in, h, w).
        merged: As in :func:`merged_linear`, (C_out, C_in, K, K).
        base: Frozen, with padding of zeros, in one group.
        down: First factor, (R, C_in, K, K), with the strides of `base`.
        up: Second factor, (C_out, R, 1, 1).
        scale: Of their product.
    """
    geometry = (base.stride, base.padding, base.dilation)
    return _MergedConv2d.apply(x, down, up, merged, base.weight, base.bias, scale, geometry)


def _by_whole_weight(rows: int, size_in: int, size_out: int, rank: int) -> bool:
    """Return True if the gradient of the whole weight takes fewer multiplications than the way through the rank."""
    return rows * size_in * size_out + 2 * rank * size_in * size_out < 2 * rows * rank * (size_in + size_out)


def _factors(gradient: Tensor, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the factors' gradients by that of the whole weight, (D_out, D_in); factors as matrices."""
    return (up.t() @ gradient).mul_(scale), (gradient @ down.t()).mul_(scale)


class _Weights:
    """What a backward pass needs of the weights, held beside the saved tensors, which may be sent to the host's memory.

    Args:
        merged: With the product of the factors.
        base: Without it.
    """

    def __init__(self, merged: Tensor, base: Tensor) -> None:
        self._merged, self.base, self._version = merged, base, merged._version

    def of(self, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """Return the merged weight, made again where the backward pass is itself differentiated (``create_graph``)."""
        if torch.is_grad_enabled():
            return self.base + scale * (up.flatten(1) @ down.flatten(1)).view(self.base.shape)
        if self._merged._version != self._version:
            raise RuntimeError("the adapter was changed between a forward pass on merged weights and its backward pass")
        return self._merged


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, merged: Tensor, weight: Tensor, bias: Any, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, down, up)
        ctx.weights, ctx.scale = _Weights(merged, weight), scale
        return functional.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up = ctx.saved_tensors
        (dy,) = gradients
        dx = dy @ ctx.weights.of(down, up, ctx.scale) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return dx, *[None] * 6
        rows, inputs = dy.flatten(0, -2), x.flatten(0, -2)
        if _by_whole_weight(len(rows), x.shape[-1], dy.shape[-1], len(down)):
            d_down, d_up = _factors(rows.t() @ inputs, down, up, ctx.scale)
        else:
            d_down, d_up = (rows @ up * ctx.scale).t() @ inputs, rows.t() @ (inputs @ down.t() * ctx.scale)
        return dx, d_down, d_up, None, None, None, None


class _MergedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, merged: Tensor, weight: Tensor, bias: Any, scale: float,
        geometry: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, down, up)
        ctx.weights, ctx.scale, ctx.geometry = _Weights(merged, weight), scale, geometry
        return functional.conv2d(x, merged, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up = ctx.saved_tensors
        (dy,), geometry, scale = gradients, ctx.geometry, ctx.scale
        flat_down, flat_up = down.flatten(1), up.flatten(1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = conv2d_input(x.shape, ctx.weights.of(down, up, scale), dy, *geometry)
        if not any(ctx.needs_input_grad[1:3]):
            return dx, *[None] * 7
        rows = prod((len(dy), *dy.shape[2:]))
        if _by_whole_weight(rows, flat_down.shape[1], dy.shape[1], len(down)):
            gradient = conv2d_weight(x, ctx.weights.base.shape, dy, *geometry).flatten(1)
            d_down, d_up = _factors(gradient, flat_down, flat_up, scale)
            d_down, d_up = d_down.view(down.shape), d_up.view(up.shape)
        else:
            inner = functional.conv2d(x, down, None, *geometry)
            d_down = conv2d_weight(x, down.shape, conv2d_input(inner.shape, up, dy) * scale, *geometry)
            d_up = conv2d_weight(inner * scale, up.shape, dy)
        return dx, d_down, d_up, None, None, None, None, None
