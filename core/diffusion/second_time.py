"""Networks that take a second time r beside t: which embedding is applied, and derivatives with respect to both times.

A family that supports it declares ``Capabilities(second_time=True)`` and builds its ``add_second_time``, ``predict``,
``generate``, ``export`` and ``load_student`` from these functions. The embedding itself and the sampler lie in
:mod:`.flow_map`, which is copied beside exported students and is imported when first needed, since it imports
diffusers.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from .flow_map import SecondTime

SCHEDULER = "FlowMapScheduler"
"""Name, in a :class:`.sampler.Sampler`, of the scheduler that supplies r."""
PREFIX = "second_time."
"""Prefix of the names of its weights: ``second_time.<role>.``."""


class _PlainNorms(TorchFunctionMode):
    """Gives norms contiguous tensors of one type, at least fp32, and returns the type of their input.

    PyTorch's forward-mode derivative fails on channels-last inputs, and has another type than the value where
    weights and input differ, as under autocast.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (nn.functional.group_norm, nn.functional.layer_norm):
            return func(*args, **(kwargs or {}))
        dtype = args[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        args = [arg.to(wide).contiguous() if isinstance(arg, Tensor) else arg for arg in args]
        kwargs = {key: arg.to(wide) if isinstance(arg, Tensor) else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs).to(dtype)


@contextlib.contextmanager
def differentiable_forward() -> Iterator[None]:
    """Use kernels that have a forward-mode derivative inside the block (:func:`torch.func.jvp`, dual numbers).

    Attention is computed by plain matrix products, since the fused kernels have no such derivative. That holds the
    (B, heads, queries, keys) weights in memory, so exact derivatives of large images are expensive; differences of two
    calls are not.
    """
    with sdpa_kernel(SDPBackend.MATH), _PlainNorms():
        yield


def add_second_time(network: nn.Module, *, name: str, path: str, width: int, untimed: int = 0) -> SecondTime:
    """Give `network` in place an embedding of r that starts at zero, trainable, fp32; see :func:`.flow_map.install`."""
    from .flow_map import install

    return install(network, name=name, path=path, width=width, untimed=untimed)


def active_second_time(network: nn.Module) -> str | None:
    """Return the name of the second time that goes with the active adapters; None where there is none.

    One that has the name of an adapter goes with that adapter; another belongs to the network itself.
    """
    times: Any = getattr(network, "second_time", None)
    if times is None:
        return None
    adapters: Any = getattr(network, "peft_config", {})
    on = _active_adapters(network) if adapters else ()
    names = [name for name in times if name in on or name not in adapters]
    if len(names) > 1:
        raise ValueError(f"several second times are on at once: {names}")
    return names[0] if names else None


def _active_adapters(network: nn.Module) -> tuple[str, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in network.modules() if isinstance(module, BaseTunerLayer)), None)
    return () if layer is None or layer.disable_adapters else tuple(layer.active_adapters)


def second_time_input(network: nn.Module, t: Tensor, r: Tensor | None) -> AbstractContextManager[None]:
    """Feed `network` both times inside the block, for one forward pass; do nothing where `r` is None.

    Args:
        network: The network, its adapters already set.
        t: Times in the network's own units, shape (B,).
        r: Second times, likewise.

    Raises:
        ValueError: The network, with its active adapters, takes no second time.
    """
    if r is None:
        return nullcontext()
    name = active_second_time(network)
    if name is None:
        raise ValueError("this network takes no second time: declare the role with second_time=True, or pass r=None")
    times: Any = network.second_time
    return times.given(name, lambda: (t, r))


def sampled_by(network: nn.Module, scheduler: Any) -> AbstractContextManager[None]:
    """Feed `network` the times of `scheduler` inside the block; do nothing where the network takes one time only.

    Raises ValueError when the scheduler has no second time.
    """
    name = active_second_time(network)
    if name is None:
        return nullcontext()
    if not hasattr(type(scheduler), "pair"):
        raise ValueError(f"this network takes a second time, which {type(scheduler).__name__} lacks: use {SCHEDULER}")
    times: Any = network.second_time
    return times.given(name, lambda: scheduler.pair)


# -- students on disk -------------------------------------------------------------------------------------------------


def export_second_time(network: nn.Module, folder: Path, *, component: str, name: str) -> None:
    """Write ``flow_map.py`` and, where the network has one, ``second_time.safetensors`` into `folder`.

    Args:
        network: The trained network.
        folder: Folder of the student.
        component: Name of the network in a pipeline.
        name: The role; a network without an adapter of this name exports its own second time.
    """
    from safetensors.torch import save_file

    from . import flow_map

    shutil.copyfile(str(flow_map.__file__), folder / "flow_map.py")
    times: Any = getattr(network, "second_time", {})
    chosen = name if name in times else active_second_time(network)
    if chosen is None:
        return
    state = {key: value.detach().float().cpu().contiguous() for key, value in times[chosen].state_dict().items()}
    place = json.dumps({"component": component, "module": times.path, "untimed": times.untimed})
    save_file(state, folder / flow_map.WEIGHTS, metadata={flow_map.PLACE: place})


@contextlib.contextmanager
def detached_second_time(network: nn.Module) -> Iterator[None]:
    """Remove the second times of `network` inside the block, to write what plain diffusers reads."""
    times = network._modules.pop("second_time", None)
    try:
        yield
    finally:
        if times is not None:
            network.add_module("second_time", times)


def load_second_time(network: nn.Module, folder: Path, *, name: str) -> None:
    """Load the second time stored beside a student onto `network`, frozen; do nothing where there is none."""
    from . import flow_map

    flow_map.load_second_time(network, folder, name=name)
