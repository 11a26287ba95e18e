"""Named random draws: pure functions of (seed, name, step, position) and of nothing else.

Resuming, accumulating and splitting over processes change neither step nor position in the global batch, hence no draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def derive_seed(seed: int, *parts: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and every part."""
    text = "\x1f".join([str(seed), *(str(part) for part in parts)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, name: str, step: int = 0, position: int = 0) -> torch.Generator:
    """Return a CPU generator for the draw `name` of one sample at one step."""
    return torch.Generator().manual_seed(derive_seed(seed, name, step, position))


class RngStreams:
    """The random draws of one micro-batch: row i depends on (seed, name, step, positions[i]) alone.

    Args:
        seed: The run's seed.
        step: The optimizer step.
        positions: Position of each sample in the global batch.
        device: Device of the results (drawn on the CPU, so that every device sees the same).
    """

    def __init__(self, seed: int, step: int, positions: Sequence[int], device: str | torch.device = "cpu") -> None:
        self.seed, self.step, self.positions, self.device = seed, step, tuple(positions), torch.device(device)

    def _each(self, name: str) -> list[torch.Generator]:
        return [generator(self.seed, name, self.step, position) for position in self.positions]

    def _send(self, rows: list[Tensor]) -> Tensor:
        stacked = torch.stack(rows)
        if self.device.type == "cuda":
            stacked = stacked.pin_memory()
        return stacked.to(self.device, non_blocking=True)

    def randn(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, shape (B, *shape), float32."""
        return self._send([torch.randn(tuple(shape), generator=g) for g in self._each(name)])

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return uniform numbers in [low, high), shape (B,), float64."""
        rows = [torch.rand((), generator=g, dtype=torch.float64) * (high - low) + low for g in self._each(name)]
        return self._send(rows)

    def integers(self, name: str, high: int) -> Tensor:
        """Return uniform integers in {0, ..., high - 1}, shape (B,), int64."""
        return self._send([torch.randint(high, (), generator=g) for g in self._each(name)])

    def shared_integer(self, name: str, high: int) -> int:
        """Return a uniform integer in {0, ..., high - 1}, the same for all samples and processes of the step."""
        return int(torch.randint(high, (), generator=generator(self.seed, f"shared/{name}", self.step)))


def generator_states() -> dict[str, Tensor]:
    """Return the states of the global generators, for anything that draws from them (a plugin)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Restore what :func:`generator_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
