"""Networks that are compiled by ``torch.compile``, block by block or as a whole, with static shapes.

A region is the forward of one block, adapters and their switch inside it, gradient checkpointing outside: of a UNet's
transformers, which recompute block by block, it is one of these blocks then. Blocks of the same kind and sizes share
what is compiled. One region is compiled once for each way in which it is called: with and without a gradient, with each
role's adapter, for each shape of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..errors import UserError
from ..utils.eagerly import note_compiled

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from .networks import Networks

logger = logging.getLogger(__name__)
Chosen = Literal["off", "regions", "whole"]
CompileMode = Literal["auto", "off", "regions", "whole"]
LONG_ENOUGH = 1000
"""Steps from which on compiling pays: it takes one to three minutes, and saves tenths of a second a step."""
MOST_VARIANTS = 64
"""Ways to call one region that are compiled; for further ones it runs as written, and PyTorch warns of that."""


@dataclass(frozen=True)
class CompileSettings:
    """Settings that decide what is compiled.

    Attributes:
        mode: As asked for.
        gradient_checkpointing: The run's.
        dropout: That of the adapters.
        quantised: Whether the base is.
        lockstep: Whether several processes share weights.
        memory_budget: Share (0 to 1) of a region's activations that its backward pass may keep.
    """

    mode: CompileMode = "auto"
    gradient_checkpointing: bool = False
    dropout: float = 0.0
    quantised: bool = False
    lockstep: bool = False
    memory_budget: float = 1.0

    def check(self, device: torch.device) -> None:
        """Raise UserError where what is asked for cannot be compiled."""
        if self.mode in ("auto", "off"):
            return
        if self.mode == "whole" and self.gradient_checkpointing:
            raise UserError(
                "compile = whole with gradient_checkpointing: the blocks' recomputation cannot lie inside one region",
                "set compile=regions, or gradient_checkpointing=false with an activation_memory_budget below 1",
            )
        if self.lockstep:
            raise UserError(
                "compile with weights that several processes share (parallel = fsdp, zero2, zero3) is not supported: "
                "their weights come and go around each block",
                "set compile=off, or parallel=replicate",
            )
        problem = compiler_problem(device)
        if problem:
            raise UserError(f"compile = {self.mode}: {problem}", "install it, or set compile=off")

    def chosen(self, device: torch.device, *, num_steps: int) -> Chosen:
        """Return what is compiled on `device` in a run of `num_steps`: `auto` compiles where it pays and nothing is
        known to stand against it.
        """
        if self.mode != "auto":
            return self.mode
        if device.type != "cuda" or num_steps < LONG_ENOUGH:  # asked first: looking for a compiler loads it
            return "off"
        hindered = self.lockstep or self.quantised or self.dropout > 0 or compiler_problem(device) is not None
        return "off" if hindered else "regions"


def compiler_problem(device: torch.device) -> str | None:
    """Return what is missing to compile for `device`; None if nothing is."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton, which makes the kernels, is not installed or has no such device"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (g++ or clang++), which makes the kernels"
    return None


class Compilation:
    """What of a run is compiled, and what it took.

    Args:
        settings: As asked for.
        device: The run's.
        backend: PyTorch's name of the compiler.

    Raises:
        UserError: What is asked for cannot be compiled.
    """

    def __init__(self, settings: CompileSettings, device: torch.device, *, backend: str = "inductor") -> None:
        settings.check(device)
        self._settings, self._device, self._backend = settings, device, backend
        self.mode: Chosen = "off"
        self._reported = 0
        self._forwards: dict[Any, FunctionType] = {}

    def apply(self, networks: Networks, family: ModelFamily, *, num_steps: int) -> None:
        """Let the denoisers of a run be compiled as they are called; they are complete and placed by now.

        Args:
            networks: Those of the run.
            family: Names the blocks.
            num_steps: Steps of the run.
        """
        self.mode = self._settings.chosen(self._device, num_steps=num_steps)
        if self.mode == "off":
            return
        self._configure()
        for network in networks.denoisers():
            for region in self._regions(network, family):
                region.forward = torch.compile(self._own_forward(region), dynamic=False, backend=self._backend)
        note_compiled(self.mode)
        logger.info(f"compile: {self.mode}, at the first call of each kind and shape")

    def _configure(self) -> None:
        import torch._dynamo
        import torch._functorch.config

        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = MOST_VARIANTS
        # then a region that cannot be compiled runs as written, and PyTorch warns of it
        dynamo.suppress_errors = self._settings.mode == "auto"
        functorch: Any = torch._functorch.config
        functorch.activation_memory_budget = self._settings.memory_budget
        if self._settings.quantised:
            # of packed weights PyTorch 2.13 stores sizes that it has freed: the next run reads anything, or it crashes
            functorch.enable_autograd_cache = False
        self._reported = self.num_graphs

    def _regions(self, network: nn.Module, family: ModelFamily) -> Sequence[nn.Module]:
        if self.mode == "whole":
            return [network]
        units = [network.get_submodule(name) for name in family.shard_units(network)]
        return [region for unit in units for region in _recomputed_from_outside(unit)]

    def _own_forward(self, region: nn.Module) -> MethodType:
        """Return the region's forward with a code object for regions of its kind and sizes alone.

        PyTorch keeps what it compiled with the code, and looks through all of it at each call: regions of other widths
        would be in the way.
        """
        forward: Any = type(region).forward
        sizes = tuple((name, tuple(weight.shape)) for name, weight in region.named_parameters())
        key = type(region), sizes
        if key not in self._forwards:
            code = forward.__code__.replace(co_name=forward.__code__.co_name)
            own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            self._forwards[key] = own
        return MethodType(self._forwards[key], region)

    @property
    def num_graphs(self) -> int:
        """Number of graphs that this process has compiled."""
        return _counters().get("unique_graphs", 0)

    def report(self, step: int) -> None:
        """Log what was compiled since the last report, with the time that it took in all."""
        if self.mode == "off" or self.num_graphs == self._reported:
            return
        more, self._reported = self.num_graphs - self._reported, self.num_graphs
        logger.info(f"step {step}: {more} graphs compiled, {compile_seconds():.0f} s in all so far")


def _recomputed_from_outside(unit: nn.Module) -> Sequence[nn.Module]:
    """Return the unit, or, where it recomputes blocks inside it (a UNet's transformers), those blocks.

    PyTorch cannot trace a recomputation that switches adapters, so it must lie outside of a region.
    """
    recomputing = [module for module in unit.modules() if getattr(module, "gradient_checkpointing", False)]
    lists = [child for module in recomputing for child in module.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks] if recomputing else [unit]


def _counters() -> Mapping[str, int]:
    from torch._dynamo.utils import counters

    return counters["stats"]


def compile_seconds() -> float:
    """Return the seconds that this process has spent compiling."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)
