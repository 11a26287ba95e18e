"""Optimizers by torchao, whose moments are 8- or 4-bit numbers in blocks. Its step is compiled when it is first run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.optimizer import OptimizerPlugin, OptimizerSettings
from ..core.utils.tensor_tree import load_optimizer
from ._adam import adam_arguments

if TYPE_CHECKING:
    import torch


class Torchao(OptimizerPlugin):
    """An AdamW of torchao; abstract. Its moments are tensors made of others, stored by their parts."""

    packages: ClassVar = {"torchao": "torchao>=0.17"}

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state dict, quantised moments as their parts."""
        state = optimizer.state_dict()
        return {**state, "state": {index: _in_parts(moments) for index, moments in state["state"].items()}}

    def load(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Make new moments and fill their parts: a state dict's own way of loading would unpack them."""
        load_optimizer(optimizer, {**state, "state": {}})
        for group in optimizer.param_groups:
            group["lr"] = torch_tensor(group["lr"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in state["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            saved = state["state"].get(index)
            if saved is not None:
                optimizer.state[parameter] = _filled(optimizer, parameter, saved)


SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""Name of the moments -> whether they can be negative."""


def torch_tensor(value: Any) -> torch.Tensor:
    """Return a learning rate in torchao's form: a float32 tensor that is filled in place."""
    import torch

    return torch.as_tensor(value, dtype=torch.float32)


def _in_parts(moments: Mapping[str, Any]) -> dict[str, Any]:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return {
        name: {"parts": {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}}
        if is_traceable_wrapper_subclass(value)
        else value
        for name, value in moments.items()
    }


def _filled(optimizer: Any, parameter: torch.nn.Parameter, saved: Mapping[str, Any]) -> dict[str, Any]:
    moments: dict[str, Any] = {"step": saved["step"].clone()}
    for name, signed in SIGNED.items():
        moments[name] = optimizer._new_buffer(parameter, signed)
        if isinstance(saved[name], Mapping):
            for part, value in saved[name]["parts"].items():
                getattr(moments[name], part).copy_(value)
        else:
            moments[name].copy_(saved[name])
    return moments


class TorchaoAdamW8bit(Torchao):
    """AdamW with 8-bit moments, by torchao."""

    name = "ao-adamw8bit"
    state_bytes = 2.0

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a torchao AdamW8bit."""
        from torchao.optim import AdamW8bit

        return AdamW8bit(list(parameters), **adam_arguments(settings))


class TorchaoAdamW4bit(Torchao):
    """AdamW with 4-bit moments, by torchao."""

    name = "ao-adamw4bit"
    state_bytes = 1.1

    def build(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Return a torchao AdamW4bit."""
        from torchao.optim import AdamW4bit

        return AdamW4bit(list(parameters), **adam_arguments(settings))


@hookimpl
def register_optimizers() -> Sequence[type[OptimizerPlugin]]:
    """Return the optimizers of this file."""
    return [TorchaoAdamW8bit, TorchaoAdamW4bit]
