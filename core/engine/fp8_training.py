"""Matrix products of networks that are trained whole, computed in fp8 forward and backward, by torchao.

Each product scales its two factors by their largest values and rounds them to 8 bits: e4m3 for inputs and weights, e5m2
for gradients. Weights, their gradients and the optimizer's state stay what they are, so that files do not change.
Reference: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from .networks import Networks

MULTIPLE = 16
"""Sizes of a layer's weight that the kernels take are multiples of it."""
OLDEST = (8, 9)
"""Compute capability from which on cards multiply in fp8."""
_exact = False


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute products as they are written inside the block: those of a student as its users will run it."""
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


def check_fp8(device: torch.device, *, model_type: str, mixed_precision: str, lockstep: bool) -> None:
    """Refuse runs whose products cannot be computed in fp8.

    Args:
        device: The run's.
        model_type: The run's.
        mixed_precision: The run's.
        lockstep: Whether several processes share weights.

    Raises:
        UserError: One of them stands against it, or torchao is missing.
    """
    for problem, remedy in _problems(device, model_type, mixed_precision, lockstep=lockstep):
        raise UserError(f"fp8_training: {problem}", f"{remedy}, or leave fp8_training out")


def _problems(
    device: torch.device, model_type: str, mixed_precision: str, *, lockstep: bool
) -> Iterator[tuple[str, str]]:
    if model_type != "full":
        yield "an adapter's base is not trained", "set model_type to full, or base_model_precision to fp8-torchao"
    if mixed_precision != "bf16":
        yield f"beside mixed_precision = {mixed_precision}", "set mixed_precision to bf16"
    if lockstep:
        yield "weights that several processes share are not rounded here", "set parallel to replicate"
    if importlib.util.find_spec("torchao") is None:
        yield "the package torchao is not installed", "pip install 'torchao>=0.17'"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < OLDEST:
        yield f"{device} does not multiply in fp8 (compute capability 8.9 or later does)", "choose such a card"


def train_in_fp8(networks: Networks, family: ModelFamily, *, emulate: bool = False) -> int:
    """Compute the products of the linear layers in the blocks of what is trained whole in fp8; return how many.

    What lies outside of the blocks (embeddings, first and last layers) stays, and so do layers of other sizes.

    Args:
        networks: Those of the run, complete.
        family: Names the blocks.
        emulate: Round as fp8 does, and multiply in the types that every device has.
    """
    count = 0
    for role in networks.trained_roles():
        if networks.roles[role].trains != "full":
            continue
        network = networks.module(role)
        for name in family.shard_units(network):
            for layer in network.get_submodule(name).modules():
                count += type(layer) is nn.Linear and _convert(layer, emulate=emulate)
    return count


def _convert(layer: Any, *, emulate: bool) -> bool:
    """Make a linear layer one of fp8, its weights the same; return False for sizes that the kernels do not take."""
    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return False
    from torchao.float8 import Float8LinearConfig

    kind = _layer_class()
    # inner dimensions are rows of the batch, of any number, in the weight's gradient
    made: Any = kind.from_float(layer, Float8LinearConfig(emulate=emulate, pad_inner_dim=True))
    layer.__dict__.update({key: value for key, value in made.__dict__.items() if key not in layer.__dict__})
    layer.__class__ = kind
    return True


@cache
def _layer_class() -> Any:
    from torchao.float8.float8_linear import Float8Linear

    class Fp8Linear(Float8Linear):
        """A linear layer whose products are computed in fp8 while it is trained."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias) if _exact else super().forward(x)

    return Fp8Linear
