"""The sampler of a student: a diffusers scheduler, its settings, steps and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampler:
    """How to sample from the student: validation, evaluation and export all use this same object.

    Attributes:
        scheduler: Name of a diffusers scheduler class.
        config: Keyword arguments of the scheduler that differ from the model's own scheduler config.
        num_inference_steps: The default number of steps.
        guidance_scale: The pipeline's ``guidance_scale``; 0 means off.
        call: Extra keyword arguments of the pipeline call for a number of steps, as ``{"sigmas": [...]}``.
    """

    scheduler: str
    config: Mapping[str, Any]
    num_inference_steps: int
    guidance_scale: float
    call: Mapping[str, Any] = field(default_factory=dict)
