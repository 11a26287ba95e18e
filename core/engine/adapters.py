"""The adapters of several roles on one base, and which of them a forward pass uses.

Which adapters are on is a property of each forward pass: it is set for that pass, put back afterwards, and restored for
its recomputation under gradient checkpointing, so that one backward may cross student, fake score and teacher.
``requires_grad`` is never touched by switching.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..utils.dropout import NetworkCall, current_call, within
from ..utils.memory import free_memory_bytes, gigabytes
from .lora_layers import MergedWeights

logger = logging.getLogger(__name__)
MERGING_SHARE = 0.5
"""Share of the free memory that merged weights may take: activations come later."""


def tuner_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers of `network` that carry adapters, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]


def copy_adapter(layer: Any, source: str, target: str, *, name: str, path: str, rank: int) -> None:
    """Copy one layer's weights from adapter `source` to `target`, so that both contribute the same."""
    has_source, has_target = source in layer.lora_A, target in layer.lora_A
    if has_source != has_target:
        raise UserError(
            f"init_lora = {path}: it {'adapts' if has_source else 'does not adapt'} {name}, this run does"
            f"{' not' if has_source else ''}",
            "set lora_target_modules to the modules of that LoRA",
        )
    if layer.lora_A[source].weight.shape != layer.lora_A[target].weight.shape:
        raise UserError(
            f"init_lora = {path}: its rank is {layer.r[source]}, this run's lora_rank = {rank}",
            f"set lora_rank to {layer.r[source]}",
        )
    layer.lora_A[target].weight.copy_(layer.lora_A[source].weight)
    ratio = layer.scaling[source] / layer.scaling[target]
    layer.lora_B[target].weight.copy_(layer.lora_B[source].weight * ratio)


class AdapterSwitch:
    """Sets which adapter of a peft-injected network is active, without touching ``requires_grad``.

    Args:
        network: A network that adapters were injected into.
        merging: Whether passes run on merged weights, where they may and memory has room for them.
    """

    def __init__(self, network: nn.Module, *, merging: bool = False) -> None:
        self._layers: list[Any] = [module for _, module in tuner_layers(network)]
        self.active: str | None = None
        self._merged = MergedWeights(self._layers) if merging else None
        self._in_use: str | None = None
        self._without_room: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Switch all adapters off, whatever was on."""
        self._apply(None)

    def changed(self, adapter: str | None = None) -> None:
        """Tell that the weights of `adapter`, or of any, were changed."""
        if self._merged is not None:
            self._merged.forget(adapter)

    def _apply(self, adapter: str | None) -> None:
        # peft's public switches clear requires_grad of the inactive adapters, hence its two fields directly
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self.active = adapter

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[None]:
        """Switch on `adapter` (None: none) inside the block; restore what was on before, also on an error."""
        before = self.active
        merges = adapter is not None and self._has_room(adapter)
        with self._merged_as(adapter if merges else None):
            if adapter == before:
                yield
                return
            self._apply(adapter)
            try:
                yield
            finally:
                self._apply(before)

    @contextmanager
    def _merged_as(self, adapter: str | None) -> Iterator[None]:
        """Run on the merged weights of `adapter` inside the block; None: on none."""
        before = self._in_use
        if adapter == before:
            yield
            return
        self._set_merged(adapter)
        try:
            yield
        finally:
            self._set_merged(before)

    def _set_merged(self, adapter: str | None) -> None:
        assert self._merged is not None
        if self._in_use is not None:
            self._merged.leave(self._in_use)
        if adapter is not None:
            self._merged.use(adapter)
        self._in_use = adapter

    def _has_room(self, adapter: str) -> bool:
        """Return True if passes of `adapter` run on merged weights; one that found memory short does not ask again."""
        if self._merged is None or adapter in self._without_room:
            return False
        needed = self._merged.bytes_of(adapter)
        if not needed:
            return True
        free = free_memory_bytes(self._device)
        if needed <= free * MERGING_SHARE:
            return True
        logger.info(
            f"passes of {adapter} run with the adapter as it is: copies of the weights take "
            f"{gigabytes(needed)}, and {gigabytes(free)} are free"
        )
        self._without_room.add(adapter)
        return False

    @property
    def _device(self) -> str:
        return str(self._layers[0].base_layer.weight.device)

    def checkpoint(self, module: nn.Module, *args: Any) -> Any:
        """Run `module` under gradient checkpointing, its recomputation with the adapters and the dropout of the forward
        pass.
        """
        adapter, call = self.active, current_call()
        return checkpoint(
            module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self._again(adapter, call))
        )

    @contextmanager
    def _again(self, adapter: str | None, call: NetworkCall | None) -> Iterator[None]:
        with self.use(adapter), within(call):
            yield
