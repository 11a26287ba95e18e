"""What a step makes the host and the device do, counted: calls of networks, reads by the host, copies.

Counts depend on no machine: a test can hold them exactly, where a time could only be compared.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..utils.spans import FEATURES, FORWARD, measured_by

PACKAGE = Path(__file__).resolve().parents[2]
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
"""Operators whose result the host waits for: a number, or a tensor whose size depends on numbers."""
READ_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
"""Methods that read a tensor and reach no operator on the CPU."""
COPIES = {"_to_copy", "copy_"}


@dataclass(frozen=True)
class CountedCall:
    """One call of a denoiser.

    Attributes:
        span: Name of the span it lies in, ``forward teacher`` or ``features fake_score``; empty outside of both.
        rows: Samples in its batch.
        gradient: Whether a backward pass may follow.
    """

    span: str
    rows: int
    gradient: bool


@dataclass
class StepCounts:
    """What was counted.

    Attributes:
        calls: Calls of denoisers, in their order.
        reads: Reads of tensors by the host, by the function that asked for it: ``core/engine/optimize.py _step_if``.
            Tensors on the host count as well, whose reading waits for nothing.
        casts: Bytes written by copies from one type to another, by both: ``float32 -> bfloat16``.
        copied_bytes: Bytes written by copies that keep the type.
    """

    calls: list[CountedCall] = field(default_factory=list)
    reads: Counter[str] = field(default_factory=Counter)
    casts: Counter[str] = field(default_factory=Counter)
    copied_bytes: int = 0

    def rows(self) -> dict[str, list[int]]:
        """Return the samples of each call by its span; those that a backward pass may follow are marked with ``+``."""
        found: dict[str, list[int]] = {}
        for call in self.calls:
            found.setdefault(f"{call.span}{' +' if call.gradient else ''}", []).append(call.rows)
        return found


class StepCounter:
    """Counts what happens inside a block; :meth:`take` gives the counts since it was last called."""

    def __init__(self) -> None:
        self._counts, self._spans = StepCounts(), list[str]()

    def take(self) -> StepCounts:
        """Return what was counted, and begin anew."""
        counts, self._counts = self._counts, StepCounts()
        return counts

    @contextmanager
    def counting(self) -> Iterator[StepCounter]:
        """Count what this thread does inside the block, backward passes on the CPU included."""
        with ExitStack() as stack:
            stack.enter_context(measured_by(self._span))
            stack.enter_context(_Functions(self._read))
            stack.enter_context(_Operators(self))
            yield self

    def watch(self, networks: Mapping[str, nn.Module]) -> None:
        """Count the calls of these denoisers, each once; modules of another kind are left out."""
        for network in _distinct(networks.values()):
            if hasattr(network, "config"):
                network.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        sample = args[0] if args else settings["hidden_states"]
        self._counts.calls.append(
            CountedCall(self._spans[-1] if self._spans else "", len(sample), torch.is_grad_enabled())
        )

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        if name.split()[0] not in (FORWARD, FEATURES):
            yield
            return
        self._spans.append(name)
        try:
            yield
        finally:
            self._spans.pop()

    def _read(self) -> None:
        self._counts.reads[_asking()] += 1

    def operator(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Count one operator that ran.

        Args:
            name: Its name in aten.
            args: Its arguments.
            result: What it returned.
        """
        if name in READS:
            self._read()
        elif name in COPIES and isinstance(result, Tensor):
            source = args[1] if name == "copy_" else args[0]
            if not isinstance(source, Tensor) or source.dtype == result.dtype:
                self._counts.copied_bytes += result.nbytes
            else:
                self._counts.casts[f"{_short(source)} -> {_short(result)}"] += result.nbytes


class _Operators(TorchDispatchMode):
    """Sees every operator below autograd."""

    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._counter.operator(func.overloadpacket.__name__, args, result)
        return result


class _Functions(TorchFunctionMode):
    """Sees the methods that read a tensor without an operator."""

    def __init__(self, read: Callable[[], None]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READ_METHODS:
            self._read()
        return func(*args, **(kwargs or {}))


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _asking() -> str:
    """Return the innermost function that is neither torch's nor of this module, by its file in its package."""
    torch_folder, frame = str(Path(torch.__file__).parent), sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(torch_folder)
    ):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    inside = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else Path(*path.parts[-2:])
    return f"{inside.as_posix()} {frame.f_code.co_name}"
