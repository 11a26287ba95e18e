"""Weights of loss terms that may change over a run."""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated

from pydantic import BeforeValidator, Field

Number = Annotated[float, Field(ge=0, le=1e6)]


def _steps_as_numbers(value: object) -> object:
    """Turn the text keys of JSON objects into numbers."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdigit() else key: weight for key, weight in value.items()}


Steps = Annotated[dict[Annotated[int, Field(ge=0)], Number], Field(min_length=1)]
Weight = Annotated[Number | Steps, BeforeValidator(_steps_as_numbers)]
"""A number, or ``{step: number}``: linear between the steps named, constant before the first and after the last."""


def weight_at(weight: float | dict[int, float], step: int) -> float:
    """Return the weight at optimizer step `step`."""
    if not isinstance(weight, dict):
        return float(weight)
    steps = sorted(weight)
    after = bisect_right(steps, step)
    if after == 0:
        return weight[steps[0]]
    if after == len(steps):
        return weight[steps[-1]]
    low, high = steps[after - 1], steps[after]
    share = (step - low) / (high - low)
    return weight[low] + share * (weight[high] - weight[low])


def ever_positive(weight: float | dict[int, float]) -> bool:
    """Return True if the term has a weight above 0 at some step."""
    return any(value > 0 for value in weight.values()) if isinstance(weight, dict) else weight > 0
