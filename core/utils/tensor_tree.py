"""Nested state as flat tensors plus JSON, exactly, without pickle.

Optimizers keep their state in dictionaries with integer keys, tensors inside parameter groups, ``None`` here and
there. :func:`flatten` puts every tensor under a flat name (for safetensors) and the rest into JSON that says where each
belongs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = (str, bool, int, type(None))


def flatten(tree: object, *, name: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split `tree` into tensors by dotted name and a skeleton of JSON values.

    Args:
        tree: Dictionaries (keys of type str or int), lists, tuples, tensors, numbers, strings, booleans, None.
        name: Prefix of the tensors' names.

    Raises:
        TypeError: A value of another type; the message names its position.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(tree, name, tensors)


def restore(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Undo :func:`flatten`."""
    if isinstance(skeleton, dict):
        ((kind, content),) = skeleton.items()
        return _RESTORE[kind](tensors, content)
    return skeleton


def _encode(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if name in tensors:
            raise TypeError(f"two tensors would be stored as {name!r}")
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(
                    f"{name or 'state'} has a key {key!r} of type {type(key).__name__}; str and int can be stored"
                )
        return {"dict": [[key, _encode(item, _join(name, key), tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, _join(name, index), tensors) for index, item in enumerate(value)]}
    if type(value) in (*_PLAIN, float):
        return value
    raise TypeError(f"{name or 'state'} is a {type(value).__name__}, which cannot be stored exactly without pickle")


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _restore_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name]


_RESTORE = {
    "tensor": _restore_tensor,
    "float": lambda tensors, text: float(text),
    "dict": lambda tensors, items: {key: restore(tensors, item) for key, item in items},
    "list": lambda tensors, items: [restore(tensors, item) for item in items],
    "tuple": lambda tensors, items: tuple(restore(tensors, item) for item in items),
}


def optimizer_to_tensors(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Return the state of any torch optimizer (or learning-rate scheduler) as flat tensors and JSON."""
    return flatten(dict(state_dict))


def tensors_to_optimizer(tensors: Mapping[str, Tensor], meta: Any) -> dict[str, Any]:
    """Return the state dict that :func:`optimizer_to_tensors` was given."""
    return restore(tensors, meta)


def load_optimizer(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict bit for bit.

    ``Optimizer.load_state_dict`` casts every moment to the type of its parameter, which rounds fp32 moments of bf16
    parameters, and leaves it in the memory layout of the file: fused kernels traverse parameter and moment in memory
    order, so that a contiguous moment of a channels-last weight would be applied elsewhere. Both are mended.
    """
    optimizer.load_state_dict(dict(state_dict))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, saved in state_dict["state"].get(index, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
                optimizer.state[parameter][key] = _like(saved, loaded, parameter)


def _like(saved: Tensor, loaded: Tensor, parameter: Tensor) -> Tensor:
    """Return `saved` with its own type, on the device of `loaded`, laid out as `parameter` where it has its shape."""
    if saved.shape != parameter.shape or saved.ndim == 0:
        return saved.to(device=loaded.device, copy=True)
    return torch.empty_like(parameter, dtype=saved.dtype, device=loaded.device).copy_(saved).detach()


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that safetensors accepts, copied where need be: on the CPU, contiguous, no two on one storage."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result
