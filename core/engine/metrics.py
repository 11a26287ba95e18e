"""Metrics of each step: collected on the device without synchronising it, written as one JSON line per step."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..utils.files import append_whole

Row = tuple[int, dict[str, float]]


class MetricBuffer:
    """Metrics of the steps since the last flush, still on the device.

    :meth:`add` never waits for the device; :meth:`flush` waits once, for one copy per device.
    """

    def __init__(self) -> None:
        self._floats: list[tuple[int, dict[str, float]]] = []
        self._stacks: list[Tensor] = []
        self._slots: list[list[tuple[int, str]]] = []

    def __len__(self) -> int:
        """Return the number of steps in the buffer."""
        return len(self._floats)

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep the present values of `metrics`; several calls for one step add up to one row.

        Args:
            step: Optimizer step; never smaller than the last one.
            metrics: Scalars by name: tensors of one element on any device, or numbers.

        Raises:
            ValueError: A name that this step already has, a tensor of several elements, or a step out of order.
        """
        row = self._row(step)
        index = len(self._floats) - 1
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for name, value in metrics.items():
            if name in row:
                raise ValueError(f"step {step} already has a metric {name!r}")
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; a scalar is needed")
                row[name] = math.nan  # keeps the place; replaced by flush
                groups.setdefault((value.device, value.dtype), []).append((name, value.detach().reshape(())))
            else:
                row[name] = float(value)
        for named in groups.values():
            # Stacking copies: a buffer that the caller reuses may change afterwards.
            self._stacks.append(torch.stack([value for _, value in named]))
            self._slots.append([(index, name) for name, _ in named])

    def flush(self) -> list[Row]:
        """Return the rows since the last flush, in order; the one place that waits for the device."""
        rows = self._floats
        by_device: dict[torch.device, list[int]] = {}
        for position, stack in enumerate(self._stacks):
            by_device.setdefault(stack.device, []).append(position)
        for positions in by_device.values():
            values = torch.cat([_widened(self._stacks[position]) for position in positions]).tolist()
            slots = [slot for position in positions for slot in self._slots[position]]
            for (index, name), value in zip(slots, values, strict=True):
                rows[index][1][name] = value
        self._floats, self._stacks, self._slots = [], [], []
        return rows

    def _row(self, step: int) -> dict[str, float]:
        if not self._floats or self._floats[-1][0] < step:
            self._floats.append((step, {}))
        elif self._floats[-1][0] > step:
            raise ValueError(f"metrics of step {step} come after those of step {self._floats[-1][0]}")
        return self._floats[-1][1]


def _widened(values: Tensor) -> Tensor:
    """Return `values` in the widest type of the device, so that nothing is lost (Apple's GPUs have no float64)."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


class MetricsFile:
    """``metrics.jsonl``: one line per optimizer step, floats printed so that reading them back gives the same bits.

    Non-finite values are written as the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``: JSON has no such number.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: IO[bytes] | None = None
        self._waiting: list[Row] = []

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and hand them to the operating system, so that a killed process loses none of them.

        Where the system refuses, no part of a row is left in the file, and the rows are written with the next ones.
        """
        self._waiting += rows
        text = "".join(
            json.dumps({"step": step, **_strict(values)}, allow_nan=False) + "\n" for step, values in self._waiting
        )
        if text:
            append_whole(self._open(), text.encode())
            self._waiting = []

    def sync(self) -> None:
        """Wait until the lines are on disk (before a checkpoint that counts on them)."""
        self.append(())
        if self._file is not None:
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps and a line torn by a kill: the run continues after `step`."""
        self.close()
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            file.truncate(_length_up_to(file, step))
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the file; appending opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        return self._file


def read_metrics(path: Path) -> Iterator[Row]:
    """Yield the rows of a ``metrics.jsonl``; a torn last line is left out."""
    with Path(path).open("rb") as file:
        for line in file:
            row = _parse(line)
            if row is None:
                return
            yield row


def _length_up_to(file: IO[bytes], step: int) -> int:
    """Return the bytes of the lines that are whole and not later than `step`; steps only rise."""
    length = 0
    for line in file:
        row = _parse(line)
        if row is None or row[0] > step:
            break
        length += len(line)
    return length


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
        step = values.pop("step")
        return step, {name: float(value) for name, value in values.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _strict(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else _WORDS[str(value)] for name, value in values.items()}


_WORDS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class Throughput:
    """Samples per second and the share of time spent waiting for data, since they were last read."""

    def __init__(self) -> None:
        self._pause: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin to count from now on."""
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self._since, self._samples, self._waited = now, 0, 0.0

    def count(self, samples: int) -> None:
        """Add the samples of a step, over all processes."""
        self._samples += samples

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as time in which the host waits for batches."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out, also of figures that are read inside it."""
        self._pause = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - self._pause
            self._pause = None

    def read(self, now: float) -> dict[str, float]:
        """Return both figures up to `now` (seconds of the performance counter), and begin anew."""
        now = now if self._pause is None else self._pause
        elapsed = max(now - self._since, 1e-9)
        figures = {
            "samples_per_second": self._samples / elapsed,
            "wait_for_data_share": min(1.0, self._waited / elapsed),
        }
        self._begin(now)
        return figures
