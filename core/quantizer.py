"""The contract of a quantizer: what it needs, and how it holds the weights of a frozen network in fewer bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Quantizer(ABC):
    """Holds the large weights of a frozen network in fewer bits; the LoRA on top stays as it is.

    Nothing merges a LoRA into a network that was quantised: exports are adapters.
    """

    name: ClassVar[str]
    """As in ``base_model_precision``: bits and library, ``int8-quanto``."""
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> what to pip install."""
    bytes_per_weight: ClassVar[float] = 1.0
    """Of a quantised weight, its share of the scales included; for estimates."""

    class Config(BaseModel):
        """Further options, under ``quantizer_config.<name>``."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def usable(cls, device: str) -> str | None:
        """None when it works on `device` (``cpu``, ``cuda:0``), else the reason why not and what works instead.

        Asked when its `packages` are there, before weights load.
        """
        return None

    @abstractmethod
    def quantize(self, network: nn.Module, *, device: str, keep: Collection[str] = ()) -> nn.Module:
        """The quantised `network` on `device`.

        The quantizer moves it, since libraries differ in whether weights are packed before, on or after the move.

        Args:
            network: Frozen, on the host, its weights in the type it computes in. May be changed in place.
            device: Where it is to lie.
            keep: Names of modules (whole, or the last parts of a dotted name) that stay as they are.

        Returns:
            The network, with the names of its modules as they were and each quantised layer still an
            ``nn.Linear`` (or ``nn.Conv2d``) for peft to adapt. A forward gives the same types as before, gradients
            reach its input, and two calls on one input give the same bits. `stored_bytes` is less than before.
        """

    def stored_bytes(self, network: nn.Module) -> int:
        """Bytes that the weights and buffers of `network` take, quantised or not."""
        return stored_bytes(network)


def is_kept(name: str, keep: Collection[str]) -> bool:
    """Whether the module `name` is one of `keep`, by its whole name or its last parts."""
    return any(name == kept or name.endswith(f".{kept}") for kept in keep)


def stored_bytes(network: nn.Module) -> int:
    """Bytes of the parameters and buffers of `network`, of tensors made of other tensors the parts."""
    return sum(_tensor_bytes(tensor) for tensor in [*network.parameters(), *network.buffers()])


def _tensor_bytes(tensor: Tensor | torch.nn.Parameter) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)  # torch's protocol of tensors that are made of others
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    return sum(_tensor_bytes(getattr(tensor, part)) for part in flatten()[0])
