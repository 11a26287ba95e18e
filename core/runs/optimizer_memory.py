"""Bytes of state that an optimizer keeps for each trained weight: measured on one weight, not looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plugin_api.optimizer import OptimizerPlugin, OptimizerSettings
from ..utils.packages import missing

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration

SHAPE = (64, 1280)
"""A factor of a LoRA of the usual rank, in an attention of SDXL: large enough for moments of 8 bits in blocks."""
SETTINGS = OptimizerSettings(1e-4, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)
_measured: dict[tuple[type[OptimizerPlugin], str], float] = {}


def state_bytes(plugin: OptimizerPlugin) -> float:
    """Return the bytes of state per trained weight: of two steps of the optimizer itself on one small weight.

    An optimizer whose library is missing is counted as it declares, or as two numbers of the weight's type.
    """
    import torch

    key = (type(plugin), repr(plugin.config))
    if missing(plugin.packages):
        declared = plugin.state_bytes
        return 2 * getattr(torch, plugin.parameter_dtype).itemsize if declared is None else declared
    if key not in _measured:
        _measured[key] = _measure(plugin)
    return _measured[key]


def _measure(plugin: OptimizerPlugin) -> float:
    import torch

    from ..utils.simulated_memory import tensor_bytes

    pattern = torch.linspace(-1, 1, SHAPE[0] * SHAPE[1]).view(SHAPE)  # no generator of the run is touched
    weight = torch.nn.Parameter(pattern.to(getattr(torch, plugin.parameter_dtype), copy=True))
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        optimizer = plugin.build([weight], SETTINGS)
        for step in (1, 2):
            weight.grad = (pattern / step).to(weight.dtype)
            optimizer.step()
    return sum(map(tensor_bytes, optimizer.state.values())) / weight.numel()


def planned_state_bytes(configuration: Configuration, registry: Registry) -> float:
    """Return :func:`state_bytes` of the optimizer that a configuration names."""
    return state_bytes(registry.get("optimizer", configuration.run.optimizer)(configuration.optimizer))
