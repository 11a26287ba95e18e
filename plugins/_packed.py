"""Linear layers that hold their weight packed and unpack it on use, in the backward pass again.

Autograd keeps nothing but the packed weight between the two, whatever the packing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Unpack = Callable[[], Tensor]


class _Product(torch.autograd.Function):
    """``y = x W^T`` for a frozen W that each pass unpacks again."""

    @staticmethod
    def forward(x: Tensor, unpack: Unpack) -> Tensor:
        return x @ unpack().t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Unpack], output: Tensor) -> None:
        ctx.unpack = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Product.apply(grad, lambda: ctx.unpack().t()), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Product.apply(tangent, ctx.unpack)


class PackedLinear(nn.Linear):
    """``y = x W^T + b`` with a frozen W held in other tensors; abstract.

    The parameter ``weight`` holds W in whole numbers, in any encoding: peft would give an adapter the type of a
    floating-point one, and fails to merge into whole ones rather than doing it wrong.

    Args:
        linear: The layer that it replaces.
        packed: The numbers of W, of a type of whole numbers.
    """

    def __init__(self, linear: nn.Linear, packed: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.dtype = linear.weight.dtype

    def unpack(self) -> Tensor:
        """Return W, shape (out, in)."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Return y of shape (..., out) for ``input`` of shape (..., in)."""
        y = _Product.apply(input.to(self.dtype), self.unpack)
        return y if self.bias is None else y + self.bias


class ScaledLinear(PackedLinear):
    """A weight in a byte, and a scale for each row.

    Args:
        linear: The layer that it replaces.
        numbers: Shape (out, in), one byte each.
        scale: Shape (out, 1), float32; W is their product.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, numbers: Tensor, scale: Tensor) -> None:
        super().__init__(linear, numbers.view(torch.int8))
        self.kind = numbers.dtype
        self.register_buffer("scale", scale)

    def unpack(self) -> Tensor:
        """Return W, shape (out, in)."""
        return (self.weight.view(self.kind).to(self.scale.dtype) * self.scale).to(self.dtype)


class Int4Linear(PackedLinear):
    """Two weights in a byte, and a scale and a zero point for each group of weights along a row.

    Args:
        linear: The layer that it replaces.
        group_size: Weights in a group; divides the number of inputs.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, linear: nn.Linear, *, group_size: int) -> None:
        from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine

        weight = linear.weight.detach()
        block: Any = (1, group_size)  # torchao's annotations say one number
        scale, zero_point = choose_qparams_affine(
            weight.float(), MappingType.ASYMMETRIC, block, torch.uint8, 0, 15, zero_point_dtype=torch.uint8
        )
        scale = scale.to(weight.dtype)  # as it is kept, so that weights are rounded to what they are unpacked to
        codes = quantize_affine(weight, block, scale, zero_point, torch.uint8, 0, 15)
        super().__init__(linear, codes[:, ::2] | codes[:, 1::2] << 4)
        self.block = block
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def unpack(self) -> Tensor:
        """Return W, shape (out, in)."""
        from torchao.quantization import dequantize_affine

        codes = torch.stack([self.weight & 15, self.weight >> 4], dim=-1).flatten(1)
        return dequantize_affine(
            codes, self.block, self.scale, self.zero_point, torch.uint8, 0, 15, output_dtype=self.dtype
        )
