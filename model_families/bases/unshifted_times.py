"""Flows whose pipeline shifts the noise levels by the resolution, but tells the network the times before the shift.

At the time u of a grid the noise level is sigma = m u / (1 + (m - 1) u), and the network is told 1000 u, a whole
number; m is linear in the root of the number of positions. ``predict`` takes 1000 sigma, as for all flows, and finds u.
Samplers with noise levels of their own must be called with these times too (``timesteps``), as the engine and the
snippets of students do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...core.plugin_api.family import ExportInfo
from .transformer import TransformerFamily


class UnshiftedTimes(TransformerFamily):
    """A family on such a flow."""

    @property
    def own_size(self) -> tuple[int, int]:
        """(width, height) of the images of the run in pixels."""
        return self.settings.resolution or (self.native_edge, self.native_edge)

    def shift_at(self, num_positions: int) -> float:
        """Return the shift m of the noise levels of images of so many positions."""
        config = self.scheduler_config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        root = math.sqrt(num_positions / config.get("base_image_seq_len", 256))
        mu = root * config.get("max_shift", 1.15) + config.get("base_shift", 0.5)
        return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)

    @cached_property
    def noise_config(self) -> dict[str, Any]:
        shift = self.shift_at(self.shift_positions(self.own_size))
        return {**self.scheduler_config, "use_dynamic_shifting": False, "shift": shift}

    def told(self, sigma: Tensor, *, num_positions: int) -> Tensor:
        """Return the times that the network is told at noise levels `sigma` (B,): whole numbers up to 1000."""
        m = self.shift_at(num_positions)
        return (1000 * sigma / (m - (m - 1) * sigma)).round()

    def completed_call(self, call: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        if "sigmas" not in call:
            return dict(call)
        told = self.told(torch.tensor(call["sigmas"]), num_positions=self.shift_positions(size))
        return {**call, "timesteps": [int(time) for time in told]}

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        told = self.completed_call(info.sampler.call, self.own_size).get("timesteps")
        return {**super().snippet_call(info), **({} if told is None else {"timesteps": told})}
