"""Quantisation of a run's networks, and the memory that it saves."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from .quantizer import NO_CHANGE, Quantizer, stored_bytes

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)
Precision = Literal["float32", "float16", "bfloat16"]
"""Types of weights, by torch's names."""
BASE = "base_model"


def text_encoder(number: int) -> str:
    """Return the name, as a part, of text encoder `number`, counted from 1."""
    return f"text_encoder_{number}"


class Precisions:
    """The quantizers of a run by network; a family passes every network through them as soon as its weights are final.

    Args:
        quantizers: ``base_model`` and ``text_encoder_N`` -> the quantizer of that network.
        names: The same parts -> what messages call them, whose keys are these with ``_precision``; themselves unless
            given.
    """

    def __init__(
        self, quantizers: Mapping[str, Quantizer] | None = None, *, names: Mapping[str, str] | None = None
    ) -> None:
        self._quantizers, self._names = dict(quantizers or {}), dict(names or {})
        self._stored: dict[str, tuple[int, int]] = {}

    def quantises(self, part: str) -> bool:
        """Return True if the network `part` is to be quantised."""
        return part in self._quantizers

    @property
    def parts(self) -> Collection[str]:
        """The networks that are to be quantised."""
        return self._quantizers.keys()

    def identity(self, part: str) -> str:
        """Return a text that changes with the quantised weights of `part`, for fingerprints; empty if not quantised."""
        return f"{part} {self._quantizers[part].identity}" if part in self._quantizers else ""

    def place(self, network: nn.Module, part: str, *, device: str, keep: Collection[str] = ()) -> nn.Module:
        """Move `network` to `device`, quantised where the run asks for it.

        Args:
            network: Frozen, in host memory, with weights of the type it computes in, teacher's LoRAs fused.
            part: ``base_model`` or :func:`text_encoder`.
            device: Device to move it to.
            keep: Modules to leave as they are (see :meth:`.quantizer.Quantizer.quantize`).

        Raises:
            UserError: Nothing was saved, since the network has no layer that this quantizer can pack.
        """
        quantizer = self._quantizers.get(part)
        if quantizer is None:
            return network.to(device)
        before = stored_bytes(network)
        network = quantizer.quantize(network, device=device, keep=keep)
        after = quantizer.stored_bytes(network)
        if after >= before:
            key = f"{self._names.get(part, part)}_precision"
            raise UserError(
                f"{key} = {quantizer.name!r} saves nothing: none of its layers can be packed",
                f"set {key} to {NO_CHANGE}",
            )
        if part not in self._stored:
            self._tell(part, quantizer, before, after)
        self._stored[part] = (before, after)
        return network

    def _tell(self, part: str, quantizer: Quantizer, before: int, after: int) -> None:
        from ..utils.memory import gigabytes

        saved = f"{gigabytes(before)} -> {gigabytes(after)}, {1 - after / before:.0%} saved"
        logger.info(f"{self._names.get(part, part)} quantised by {quantizer.name}: {saved}")

    def stored(self, part: str) -> tuple[int, int] | None:
        """Return the bytes of the network `part` before and after it was quantised; None where it was not."""
        return self._stored.get(part)
