"""Losses by timestep, gathered between two readings of the metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .loop import NUM_TIME_BINS, StepResult


@dataclass
class TimeBins:
    """Losses by timestep since the last flush, on the device."""

    sums: Tensor | None = None
    counts: Tensor | None = None

    def add(self, result: StepResult) -> None:
        """Add a step's sums and counts."""
        if result.bin_sums is None or result.bin_counts is None:
            return
        self.sums = result.bin_sums if self.sums is None else self.sums + result.bin_sums
        self.counts = result.bin_counts if self.counts is None else self.counts + result.bin_counts

    def flush(self) -> dict[str, float]:
        """Return the mean loss of each bin that had samples, by the share of the noisiest time."""
        if self.sums is None or self.counts is None:
            return {}
        sums, counts = torch.stack([self.sums, self.counts]).tolist()  # one wait for the device
        self.sums = self.counts = None
        width = 1 / NUM_TIME_BINS
        return {
            f"loss_by_timestep/{i * width:.1f}-{(i + 1) * width:.1f}": sums[i] / counts[i]
            for i in range(NUM_TIME_BINS)
            if counts[i]
        }
