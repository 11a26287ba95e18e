"""LoRAs fused into a network layer by layer: no more than one layer is held in float32 at a time.

A network of the same modules, whose weights take no memory, carries the adapters; each of its layers gets its weights
for the moment in which the adapters are added to them, by the library that reads them or by :mod:`.lora_kinds`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .lora import ExactLora, attach, fuse_layer
from .plain_lora import Lora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..files.architecture import Architecture
    from .lora import AnyLora

ReadWeights = Callable[[Sequence[str]], Iterable[tuple[str, "Tensor"]]]
"""Gives weights by their names, in the order of these and one at a time: float32, on the CPU, in memory of their own
that may be changed."""


def fused_weights(
    architecture: Architecture, part: str, empty: nn.Module, loras: Sequence[AnyLora], *, read: ReadWeights
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a network that LoRAs change, by name, in float32: each layer after all of them.

    Args:
        architecture: The architecture whose pipeline reads the LoRAs.
        part: The network's name in the pipeline: ``unet``, ``text_encoder``, ``text_encoder_2``.
        empty: The network on the meta device.
        loras: Applied one after the other; the order matters to DoRAs alone, and to rounding.
        read: Gives the network's own weights.
    """
    loras = [lora for lora in loras if lora.has(part)]
    if not loras:
        return
    network = _without_memory(empty)
    adapters = {f"teacher_lora_{n}": lora for n, lora in enumerate(loras) if isinstance(lora, Lora)}
    attach(architecture, {part: network}, adapters)
    layers = _Layers(network, part, {id(lora): adapter for adapter, lora in adapters.items()}, loras)
    groups = layers.groups()
    values = iter(read([name for group in groups for name in layers.names(group)]))
    for group in groups:
        yield from layers.fused(group, dict(next(values) for _ in layers.names(group))).items()


def adapter_factors(
    architecture: Architecture, part: str, empty: nn.Module, loras: Sequence[Lora]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return the factors (up, down) of plain LoRAs by the paths of a network's modules, in float32.

    Scales and weights are in the first of each pair; a module that several LoRAs change has a pair of each.
    """
    loras = [lora for lora in loras if lora.has(part)]
    network = _without_memory(empty)
    adapters = {f"lora_{n}": lora for n, lora in enumerate(loras)}
    attach(architecture, {part: network}, adapters)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path, module in network.named_modules():
        for adapter in adapters if hasattr(module, "lora_A") else ():
            if adapter in module.lora_A:
                down, up = (each[adapter].weight.detach() for each in (module.lora_A, module.lora_B))
                found.setdefault(path, []).append((up * module.scaling[adapter], down))
    return found


def _without_memory(empty: nn.Module) -> Any:
    """Return a copy of a network of the meta device on the CPU, each weight one number repeated in its shape."""
    import torch
    from torch import nn

    network = copy.deepcopy(empty)
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                repeated = torch.zeros((), dtype=torch.float32).expand(weight.shape)
                module._parameters[name] = nn.Parameter(repeated, requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.zeros((), dtype=value.dtype).expand(value.shape)
    return network


class _Layers:
    """The layers of a network with adapters, and how LoRAs change them.

    Args:
        network: Its weights take no memory.
        part: Its name in the pipeline.
        adapters: id of a plain LoRA -> name of its adapter.
        loras: All of them, in order.
    """

    def __init__(self, network: nn.Module, part: str, adapters: Mapping[int, str], loras: Sequence[AnyLora]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._loras, self._adapters = loras, adapters
        self._exact = {
            id(lora): [(layer, target) for layer, target in lora.layers if target.modules[0][0] == part]
            for lora in loras
            if isinstance(lora, ExactLora)
        }
        found: dict[str, Any] = dict(network.named_modules())
        self._tuners = {path: module for path, module in found.items() if isinstance(module, BaseTunerLayer)}
        exact = (path for layers in self._exact.values() for _, target in layers for _, path in target.modules)
        touched = {*self._tuners, *exact}
        # in the network's order, which is that of its files
        self._modules = {path: _base(module) for path, module in found.items() if path in touched}

    def groups(self) -> list[list[str]]:
        """Return the paths of the modules that are changed, those together that one layer of a file changes."""
        group_of = {path: [path] for path in self._modules}
        for layers in self._exact.values():
            for _, target in layers:
                paths = [path for _, path in target.modules]
                joined = list(dict.fromkeys(member for path in paths for member in group_of[path]))
                group_of.update(dict.fromkeys(joined, joined))
        return list({id(group): group for group in group_of.values()}.values())

    def names(self, group: Sequence[str]) -> list[str]:
        """Return the names of the weights of a group."""
        ends = ("weight", "bias")
        found = [(path, end) for path in group for end in ends]
        return [f"{path}.{end}" for path, end in found if getattr(self._modules[path], end, None) is not None]

    def fused(self, group: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a group with every LoRA, in the order of the LoRAs; `weights` may be changed."""
        held = {name: self._parameter(name).data for name in weights}
        for name, value in weights.items():
            self._parameter(name).data = value
        for lora in self._loras:
            if isinstance(lora, ExactLora):
                for layer, target in self._exact[id(lora)]:
                    if target.modules[0][1] in group:
                        modules = [self._modules[path] for _, path in target.modules]
                        fuse_layer(layer, modules, lora.weight, swapped=target.swapped)
            else:
                self._merge(self._adapters[id(lora)], group)
        result = {name: self._parameter(name).data for name in weights}
        for name, repeated in held.items():
            self._parameter(name).data = repeated
        return result

    def _parameter(self, name: str) -> Any:
        path, _, end = name.rpartition(".")
        return getattr(self._modules[path], end)

    def _merge(self, adapter: str, group: Sequence[str]) -> None:
        for path in group:
            tuner: Any = self._tuners.get(path)
            if tuner is not None and adapter in tuner.lora_A:
                tuner.merge(adapter_names=[adapter])
                tuner.merged_adapters.clear()  # the next LoRA finds a weight, not a weight with an adapter


def _base(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
