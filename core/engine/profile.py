"""A profile of some steps: a trace for TensorBoard and Perfetto, and how long each part of a step takes.

Times are those between the begin and the end of a span, without the spans inside it: by the host's clock, and on a GPU
also by events in its stream, where the end is reached when all that was queued in between is done. So the parts add up
to the step, by either clock.
"""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..utils.spans import (
    AVERAGES,
    BACKWARD,
    DATA,
    FEATURES,
    FORWARD,
    METRICS,
    OPTIMIZER,
    REDUCTION,
    STEP,
    measured_by,
    span,
)

logger = logging.getLogger(__name__)
WARM_UP = 3
"""Steps before the first one that is profiled, where there are as many: they make what later steps find made."""
OTHER = "other"
ORDER = (DATA, FORWARD, FEATURES, BACKWARD, REDUCTION, OPTIMIZER, AVERAGES, METRICS, OTHER)


@dataclass(frozen=True)
class Part:
    """One part of a step, averaged over the profiled steps.

    Attributes:
        name: Name of the span, ``forward teacher``; ``other`` is what lies in none.
        calls: Number of spans in a step.
        cpu_ms: Milliseconds by the host's clock.
        device_ms: Milliseconds in the GPU's stream; None without one.
        share: Share of the step, in the GPU's stream where there is one.
    """

    name: str
    calls: float
    cpu_ms: float
    device_ms: float | None
    share: float


@dataclass
class _Span:
    name: str
    parent: _Span | None
    begin: float
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None
    end: float = 0.0


def planned_steps(num_steps: int, *, first: int, last: int) -> range:
    """Return the steps to profile, counted from 0, after a warm-up; of a short run as many as there are.

    Args:
        num_steps: Number of steps that is asked for.
        first: The first step that is taken.
        last: The step before which the run ends.
    """
    remaining = last - first
    if num_steps < 1 or remaining < 1:
        return range(0)
    warm_up = min(WARM_UP, max(remaining - num_steps, min(1, remaining - 1)))
    return range(first + warm_up, min(first + warm_up + num_steps, last))


class StepProfile:
    """Profiles some steps of this process, and writes what it found.

    Args:
        num_steps: Number of steps to profile; 0 = none, at no cost.
        folder: Where trace and table are written.
        device: Device of the run.
        rank: Number of this process, which names its files.
    """

    def __init__(
        self, num_steps: int = 0, *, folder: Path = Path(), device: torch.device | None = None, rank: int = 0
    ) -> None:
        self._asked, self._folder, self._rank = num_steps, folder, rank
        self._device = device or torch.device("cpu")
        self._steps, self._spans, self._open = range(0), list[_Span](), list[_Span]()
        self._profiler: torch.profiler.profile | None = None
        self._measured = ExitStack()

    def plan(self, *, first: int, last: int) -> None:
        """Choose the steps of a training from step `first` to before step `last`."""
        self._steps = planned_steps(self._asked, first=first, last=last)

    def step(self, step: int) -> AbstractContextManager[object]:
        """Return the context of optimizer step `step`."""
        if step not in self._steps:
            return nullcontext()
        if self._profiler is None:
            self._start()
        return span(STEP)

    def end_after(self, step: int) -> None:
        """Write what was found if `step` was the last one to profile."""
        if self._profiler is not None and step + 1 >= self._steps.stop:
            self.finish()

    def finish(self) -> None:
        """Write what was found, also of steps that an error or a signal cut short."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._measured.close()
        profiler.stop()
        taken = [each for each in self._spans if each.name == STEP and each.end]
        if not taken:
            return
        first, count = self._steps.start + 1, len(taken)
        name = f"rank{self._rank}-from-step-{first}"
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"{name}.pt.trace.json.gz"
        _write_trace(profiler, trace)
        parts = parts_of(self._spans, count)
        (self._folder / f"{name}.json").write_text(
            json.dumps({"first_step": first, "num_steps": count, "parts": [asdict(part) for part in parts]}, indent=2)
        )
        if self._rank == 0:
            fewer = f" ({self._asked} were asked for)" if count < self._asked else ""
            logger.info(f"profile of {count} steps from step {first}{fewer}:\n{table(parts)}\ntrace: {trace}")

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._measured.enter_context(measured_by(self._span))

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        """Take the times of a span, and name it in the trace; outside of a step only name it."""
        with torch.profiler.record_function(name):
            if not self._open and name != STEP:
                yield
                return
            measured = _Span(name, self._open[-1] if self._open else None, time.perf_counter(), self._events())
            self._spans.append(measured)
            self._open.append(measured)
            try:
                yield
            finally:
                self._open.pop()
                measured.end = time.perf_counter()
                if measured.events is not None:
                    measured.events[1].record()

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        if self._device.type != "cuda":
            return None
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        return begin, end


def _write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write the trace, packed fast: the profiler packs the gigabyte that ten steps of SDXL make for minutes."""
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=1) as packed:
        shutil.copyfileobj(source, packed, 2**20)
    plain.unlink()


def parts_of(spans: Sequence[_Span], num_steps: int) -> list[Part]:
    """Return the parts of a step from the spans of whole steps, in the order of a step."""
    clocks = [{id(each): (each.end - each.begin) * 1e3 for each in spans}]
    if spans and spans[0].events is not None:
        torch.cuda.synchronize()
        clocks.append({id(each): each.events[0].elapsed_time(each.events[1]) for each in spans if each.events})
    names = {id(each): OTHER if each.name == STEP else each.name for each in spans}
    sums = [_without_inner(spans, clock, names) for clock in clocks]
    whole = sum(sums[-1].values()) or 1.0
    return [
        Part(
            name, sum(each == name for each in names.values()) / num_steps, sums[0][name] / num_steps,
            sums[1][name] / num_steps if len(sums) > 1 else None, sums[-1][name] / whole,
        )
        for name in sorted(sums[0], key=lambda name: (ORDER.index(name.split()[0]), name))
    ]  # fmt: skip


def _without_inner(spans: Sequence[_Span], clock: dict[int, float], names: dict[int, str]) -> dict[str, float]:
    """Return milliseconds by name, each without what lies in spans inside it."""
    found = dict.fromkeys(names.values(), 0.0)
    for each in spans:
        found[names[id(each)]] += clock[id(each)]
        if each.parent is not None:
            found[names[id(each.parent)]] -= clock[id(each)]
    return found


def table(parts: Sequence[Part]) -> str:
    """Return the parts as a table in Markdown."""
    device = any(part.device_ms is not None for part in parts)
    heads = ["part", "calls a step", "CPU ms", *(["GPU ms"] if device else []), "share"]
    rows = [
        [part.name, f"{part.calls:g}", f"{part.cpu_ms:.2f}", *([f"{part.device_ms:.2f}"] if device else []),
         f"{part.share:.1%}"]
        for part in parts
    ]  # fmt: skip
    of_all = [sum(part.cpu_ms for part in parts), sum(part.device_ms or 0 for part in parts)][: 1 + device]
    rows.append(["step", "1", *(f"{total:.2f}" for total in of_all), f"{sum(part.share for part in parts):.1%}"])
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
