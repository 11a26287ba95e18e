"""Curves of a run's figures as paths of an SVG, thinned to what a screen can show."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_POINTS = 1000
WIDTH, HEIGHT = 480, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 468, 10, 180
"""The frame inside, in units of the SVG."""
LOGARITHMIC = 1000
"""A curve of positive values that spans this factor gets a logarithmic axis."""
NOISY = 6
"""A curve is smoothed when its ups and downs add up to this many times its range."""
FEW = 30
"""Values below which there is nothing to smooth."""


def by_name(rows: Iterable[tuple[int, dict[str, float]]]) -> dict[str, tuple[Floats, Floats]]:
    """Return steps and values of each figure, each of shape (n,), from the rows of a ``metrics.jsonl``.

    The names stand in the order of their first appearance; memory is sixteen bytes for each value.
    """
    found: dict[str, tuple[array[float], array[float]]] = {}
    for step, values in rows:
        for name, value in values.items():
            steps, figures = found.setdefault(name, (array("d"), array("d")))
            steps.append(step)
            figures.append(value)
    return {name: (np.array(steps), np.array(figures)) for name, (steps, figures) in found.items()}


@dataclass(frozen=True)
class Tick:
    """A line of an axis: where it is, in units of the SVG, and what stands at it."""

    at: float
    label: str


@dataclass(frozen=True)
class Series:
    """The values of one figure in one run.

    Attributes:
        label: Of the run, where several are in one chart.
        steps: Rising, shape (n,), n > 0.
        values: Shape (n,).
        best: Step of the value that is marked as the best.
        number: Of the run among several, which decides the colour.
    """

    label: str
    steps: Floats
    values: Floats
    best: int | None = None
    number: int = 0


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: Of the run, where several are in one chart.
        number: Of the run.
        points: (step, value) of the line, as they stand in the file.
        path: The line, as the ``d`` of an SVG path.
        smooth: The line without its noise, or nothing.
        last: The last value, finite or not.
        best: (step, value) of the best value, if one is marked.
        best_at: Where that is, in units of the SVG.
    """

    label: str
    number: int
    points: list[tuple[int, float]]
    path: str
    smooth: str
    last: float
    best: tuple[int, float] | None = None
    best_at: tuple[float, float] | None = None


@dataclass(frozen=True)
class Level:
    """A value that lines are compared with: its label, the value, and where it is, in units of the SVG."""

    label: str
    value: float
    at: float


@dataclass(frozen=True)
class Curve:
    """One chart.

    Attributes:
        name: Of the figure.
        lines: One for each run.
        levels: Values that the lines are compared with.
        x_ticks: Steps.
        y_ticks: Values.
        x_range: First and last step of the frame.
        y_range: Lowest and highest value of the frame.
        logarithmic: Whether the vertical axis is.
        notes: How to read it, and what it does not show.
        better: Whether more is better; None where that is not known.
    """

    name: str
    lines: list[Line]
    levels: list[Level]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    logarithmic: bool
    notes: list[str]
    better: bool | None = None


def curve(
    name: str, series: Sequence[Series], levels: Sequence[tuple[str, float]] = (), *, better: bool | None = None
) -> Curve:
    """The chart of one figure, of one run or several; what is not finite is left out and counted.

    Args:
        name: Of the figure.
        series: At least one.
        levels: (label, value) of what the figure is compared with.
        better: Whether more is better; None where that is not known.
    """
    notes = [_not_finite(each) for each in series if not np.isfinite(each.values).all()]
    shown = [(each, np.isfinite(each.values)) for each in series]
    x, y = (np.concatenate(parts) for parts in zip(*((e.steps[f], e.values[f]) for e, f in shown), strict=True))
    if not len(x):
        lines = [Line(each.label, each.number, [], "", "", float(each.values[-1])) for each in series]
        return Curve(name, lines, [], [], [], (0, 1), (0, 1), False, notes, better)
    y = np.append(y, [value for _, value in levels])
    logarithmic = bool(y.min() > 0 and y.max() / y.min() >= LOGARITHMIC)
    low, high = _limits(y, logarithmic=logarithmic)
    beyond = int(((y < low) | (y > high)).sum())
    if beyond:
        notes.append(f"{beyond:,} beyond the frame, from {short(float(y.min()))} to {short(float(y.max()))}")
    frame = _Frame((float(x.min()), max(float(x.max()), float(x.min()) + 1)), (low, high), logarithmic)
    notes += ["logarithmic"] if logarithmic else []
    return Curve(
        name,
        [_line(frame, each, finite) for each, finite in shown],
        [Level(label, value, frame.y(value)) for label, value in levels],
        [Tick(frame.x(step), f"{step:,.0f}") for step in ticks(*frame.x_range, count=7, whole=True)],
        [Tick(frame.y(value), short(value)) for value in frame.values()],
        frame.x_range, frame.y_range, logarithmic, notes, better,
    )  # fmt: skip


def _line(frame: _Frame, series: Series, finite: NDArray[np.bool_]) -> Line:
    x, y = series.steps[finite], series.values[finite]
    if not len(x):
        return Line(series.label, series.number, [], "", "", float(series.values[-1]))
    kept = thinned(y)
    smooth = smoothed(y) if _is_noisy(y) else None
    points = [(int(step), float(value)) for step, value in zip(x, y, strict=True)]
    best = next((point for point in points if point[0] == series.best), None)
    return Line(
        series.label,
        series.number,
        [points[place] for place in kept],
        frame.path(x[kept], y[kept]),
        "" if smooth is None else frame.path(x[kept], smooth[kept]),
        float(series.values[-1]),
        best,
        best and (frame.x(best[0]), frame.y(best[1])),
    )


@dataclass(frozen=True)
class _Frame:
    """From steps and values to places."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    logarithmic: bool

    def x(self, step: float) -> float:
        low, high = self.x_range
        return round(LEFT + (step - low) / (high - low) * (RIGHT - LEFT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        value = min(max(value, low), high)
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)

    def path(self, steps: Floats, values: Floats) -> str:
        positions = [f"{self.x(step):g},{self.y(value):g}" for step, value in zip(steps, values, strict=True)]
        if len(positions) == 1:
            positions *= 2  # a line of no length with round ends is a dot
        return "M" + "L".join(positions)

    def values(self) -> Sequence[float]:
        low, high = self.y_range
        if not self.logarithmic:
            return ticks(low, high, count=7)
        powers = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        return powers[:: -(-len(powers) // 6)] if powers else [low, high]


def _limits(values: Floats, *, logarithmic: bool) -> tuple[float, float]:
    """Lowest and highest value of the frame; rare spikes far away from the rest are left outside."""
    low, high = float(values.min()), float(values.max())
    if not logarithmic and len(values) >= 100:
        usual_low, usual_high = (float(edge) for edge in np.percentile(values, (0.5, 99.5)))
        spread = usual_high - usual_low
        low = usual_low if spread and low < usual_low - 3 * spread else low
        high = usual_high if spread and high > usual_high + 3 * spread else high
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    if logarithmic:
        return low, high
    margin = 0.04 * (high - low)
    return (low if low >= 0 > low - margin else low - margin), high + margin


def thinned(values: Floats, most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Places of at most `most` values, shape (m,): first, last, and lowest and highest of each stretch."""
    count = len(values)
    if count <= most:
        return np.arange(count)
    edges = np.linspace(0, count, most // 2).astype(np.int64)
    kept = {0, count - 1}
    for start, end in pairwise(edges):
        part = values[start:end]
        kept |= {int(start + part.argmin()), int(start + part.argmax())}
    return np.array(sorted(kept))


def smoothed(values: Floats) -> Floats:
    """Mean over a window of a twentieth of the values around each, shorter at the ends; shape (n,)."""
    half = max(2, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def _is_noisy(values: Floats) -> bool:
    spread = values.max() - values.min()
    return len(values) >= FEW and bool(spread > 0) and float(np.abs(np.diff(values)).sum()) > NOISY * spread


def _not_finite(series: Series) -> str:
    steps = series.steps[~np.isfinite(series.values)]
    named = ", ".join(f"{step:.0f}" for step in steps[:5])
    more = f" and {len(steps) - 5:,} more" if len(steps) > 5 else ""
    whose = f"{series.label}: " if series.label else ""
    return f"{whose}not finite at step{'s' if len(steps) > 1 else ''} {named}{more}"


def ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """Return about `count` round numbers from `low` to `high`, whole ones where only these will do."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(count, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
    return [float(number) for number in found if low <= number <= high]


def short(value: float) -> str:
    """Four significant digits, in plain notation where that is readable."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
