"""The contract of a quantizer: what it needs, and how it stores the weights of a frozen network in fewer bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NO_CHANGE = "no_change"
"""The value of ``base_model_precision`` that quantises nothing."""


class Quantizer(ABC):
    """Stores the large weights of a frozen network in fewer bits; the LoRA on top stays as it is.

    No LoRA is merged into a quantised network: exports are adapters.
    """

    name: ClassVar[str]
    """The value of ``base_model_precision``: bits and library, ``int8-quanto``."""
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> name to pip install."""
    layers: ClassVar[tuple[str, ...]] = ("Linear",)
    """Names of the ``torch.nn`` classes that it quantises; for estimates."""
    bytes_per_weight: ClassVar[float] = 1.0
    """Bytes per weight of such a layer, its share of the scales included; for estimates."""
    forward_ad: ClassVar[bool] = False
    """Whether its layers have a forward-mode derivative, which a few methods need."""

    class Config(BaseModel):
        """Further options, under ``quantizer_config.<name>``."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def usable(cls, device: str) -> str | None:
        """Return None if it works on `device` (``cpu``, ``cuda:0``), otherwise the reason and what works instead.

        Called before weights load, once its `packages` are found.
        """
        return None

    @abstractmethod
    def quantize(self, network: nn.Module, *, device: str, keep: Collection[str] = ()) -> nn.Module:
        """Return the quantised `network` on `device`.

        The quantizer moves it, since libraries differ in whether weights are packed before, on or after the move.

        Args:
            network: Frozen, in host memory, with weights of the type it computes in. May be changed in place.
            device: Device to move it to.
            keep: Names of modules (whole, or the last parts of a dotted name) that stay as they are.

        Returns:
            The network, with the names of its modules as they were and each quantised layer still an
            ``nn.Linear`` (or ``nn.Conv2d``) for peft to adapt. A forward pass gives the same types as before, gradients
            reach its input, and two calls on one input give the same bits. `stored_bytes` is less than before.
        """

    def stored_bytes(self, network: nn.Module) -> int:
        """Return the bytes that the weights and buffers of `network` take, quantised or not."""
        return stored_bytes(network)

    @property
    def identity(self) -> str:
        """A text that changes with the quantised weights, for fingerprints."""
        return f"{self.name} {self.config.model_dump_json()}"


# -- for quantizers ---------------------------------------------------------------------------------------------------


def quantised_layers(
    network: nn.Module, kinds: Collection[type[nn.Module]], keep: Collection[str]
) -> list[tuple[str, Any]]:
    """Return name and module of the layers of `network` that are of exactly one of `kinds`, without `keep`.

    Subclasses are left out: what they do with their weights is not known.
    """
    return [
        (name, module)
        for name, module in network.named_modules()
        if type(module) in kinds and not any(name == kept or name.endswith(f".{kept}") for kept in keep)
    ]


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one with this dotted name."""
    parent, _, own = name.rpartition(".")
    network.get_submodule(parent).register_module(own, module)


def stored_bytes(network: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of `network`; tensors made of other tensors count their parts."""
    return sum(_tensor_bytes(tensor) for tensor in [*network.parameters(), *network.buffers()])


def _tensor_bytes(tensor: Tensor | torch.nn.Parameter) -> int:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    parts, _ = tensor.__tensor_flatten__()
    return sum(_tensor_bytes(getattr(tensor, part)) for part in parts)
