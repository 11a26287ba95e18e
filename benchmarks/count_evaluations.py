"""A plugin that counts what a run spends on its networks, for comparisons at equal cost.

The unit is one forward pass of the denoiser for one sample. A pass that carries a gradient counts three times (its
backward costs about two forwards), one in forward-mode differentiation twice, one that stops halfway (features) half.
Recomputation under gradient checkpointing is not counted.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from distill import hookimpl
from torch import nn
from torch.autograd import forward_ad

FILE = "evaluations.json"
_count = {"evaluations": 0.0}


def _trains(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    sample = args[0]
    cost = 0.5
    if _trains(module) or (torch.is_grad_enabled() and sample.requires_grad):
        cost *= 3
    elif forward_ad._current_level >= 0 and forward_ad.unpack_dual(sample).tangent is not None:
        cost *= 2
    _count["evaluations"] += cost * len(sample)
    module.cost_of_half = cost * len(sample)  # type: ignore[assignment]


def _after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    # not reached by a pass that stops halfway
    _count["evaluations"] += float(module.cost_of_half)  # type: ignore[arg-type]


@hookimpl
def on_run_start(state: Any) -> None:
    """Watch every denoiser of the run, each once."""
    _count["evaluations"] = 0.0
    networks = {id(network): network for network in state.networks.values() if hasattr(network, "config")}
    for network in networks.values():
        network.register_forward_pre_hook(_before, with_kwargs=True)
        network.register_forward_hook(_after)


@hookimpl
def on_step_end(state: Any, step: int) -> None:
    """Keep the count up to date in the output folder; cheap beside a step."""
    (state.output_dir / FILE).write_text(json.dumps({"steps": step, **_count}) + "\n")
