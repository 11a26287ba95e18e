"""The state of an optimizer whose weights DeepSpeed has laid in a row and divided, as one process would save it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .shards import communicating_device


class Fragments:
    """The weights of an optimizer by their number in it, before DeepSpeed puts a row of all in their place.

    Args:
        optimizer: Over `weights`.
        weights: Whole.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter]) -> None:
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.weights = [weight for group in self.groups for weight in group]
        self.shapes = [weight.shape for weight in self.weights]
        assert {id(weight) for weight in self.weights} == {id(weight) for weight in weights}

    def numbers(self) -> Iterator[list[int]]:
        """Yield the numbers of the weights of each group."""
        first = 0
        for group in self.groups:
            yield list(range(first, first + len(group)))
            first += len(group)


@dataclass(frozen=True)
class Span:
    """Where a weight's elements that this process steps are.

    Attributes:
        row: The tensor that the optimizer steps.
        start: Their first in the row.
        offset: Their first in the weight.
        size: How many they are; 0 where other processes step all of the weight.
    """

    row: Tensor
    start: int
    offset: int
    size: int

    def of(self, state: Tensor) -> Tensor:
        """Return this weight's elements of a tensor beside the row."""
        return state[self.start : self.start + self.size]


def spans(engine: Any, fragments: Fragments) -> list[Span]:
    """Return the span of each weight, by number."""
    divided, found = engine.optimizer, []
    for number, group in enumerate(fragments.groups):
        for weight in group:
            if engine.zero_optimization_partition_weights():
                found.append(_span_in_third_stage(divided, weight))
                continue
            mapping, row = weight._hp_mapping, divided.single_partition_of_fp32_groups[number]
            if mapping is None:
                found.append(Span(row, 0, 0, 0))
                continue
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            found.append(Span(row, here.start, there.start, here.numel))
    return found


def _span_in_third_stage(divided: Any, weight: Any) -> Span:
    row, start, size = divided.grad_position[divided.get_param_id(weight)]
    offset = min(torch.distributed.get_rank() * size, weight.ds_numel)
    return Span(divided.fp32_partitioned_groups_flat[row], start, offset, min(size, weight.ds_numel - offset))


def saved_state(engine: Any, fragments: Fragments) -> dict[str, Any]:
    """Return the state as torch's optimizer over the whole weights has it; every process must call it.

    In host memory of the first process; the others get numbers alone.
    """
    optimizer, state = engine.basic_optimizer, {}
    for number, span in enumerate(spans(engine, fragments)):
        values = {}
        for key, value in optimizer.state.get(span.row, {}).items():
            if not isinstance(value, Tensor) or value.shape != span.row.shape:
                values[key] = value.clone() if isinstance(value, Tensor) else value
            elif (whole := _gathered(span, value, fragments.shapes[number])) is not None:
                values[key] = whole
        if values:
            state[number] = values
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"params": numbers}
        for group, numbers in zip(optimizer.param_groups, fragments.numbers(), strict=True)
    ]
    return {"state": state, "param_groups": groups}


@torch.no_grad()
def _gathered(span: Span, value: Tensor, shape: torch.Size) -> Tensor | None:
    """Return the whole of a moment in the first process, None in the others."""
    whole = torch.zeros(shape.numel(), dtype=value.dtype, device=communicating_device(value))
    whole[span.offset : span.offset + span.size] = span.of(value)
    torch.distributed.reduce(whole, dst=0)  # each element is zero in all processes but one
    return whole.view(shape).cpu() if torch.distributed.get_rank() == 0 else None


@torch.no_grad()
def load_state(engine: Any, fragments: Fragments, saved: Mapping[str, Any]) -> None:
    """Take this process's part of a state of whole weights."""
    optimizer = engine.basic_optimizer
    for group, settings in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: copy.deepcopy(value) for key, value in settings.items() if key != "params"})
    optimizer.state.clear()
    for number, span in enumerate(spans(engine, fragments)):
        state = optimizer.state[span.row]
        for key, value in saved["state"].get(number, {}).items():
            if not isinstance(value, Tensor) or value.shape != fragments.shapes[number]:
                state[key] = _beside(value, span.row, optimizer)
                continue
            if key not in state:
                state[key] = torch.zeros_like(span.row, dtype=value.dtype, requires_grad=False)
            span.of(state[key]).copy_(value.reshape(-1)[span.offset : span.offset + span.size])
    for row in [row for row, state in optimizer.state.items() if not state]:
        del optimizer.state[row]


def _beside(value: Any, row: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """Return a number of the state, as a counter of steps, where the optimizer looks for it."""
    if not isinstance(value, Tensor):
        return value
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return value.to(row.device if on_device else value.device, copy=True)
