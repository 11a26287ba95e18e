"""Convolutions in fp16 on a CPU by way of fp32, as the tensor cores of a GPU compute them; a plugin of runs.

Their backward pass has no kernel of its own on a CPU and takes four hundred times as long. Inputs, weights, outputs and
gradients are rounded to fp16, and products are summed in fp32.
"""

from __future__ import annotations

from typing import Any

import distill
import torch
from torch import Tensor

_plain = torch.nn.functional.conv2d


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *arguments: Any, **settings: Any) -> Tensor:
    """Return what torch's does."""
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.float16:
        return _plain(input, weight, bias, *arguments, **settings)
    with torch.autocast("cpu", enabled=False):
        rounded = [None if value is None else value.half().float() for value in (input, weight, bias)]
        return _plain(*rounded, *arguments, **settings).half()


@distill.hookimpl
def on_run_start(state: Any) -> None:
    """Put it in the place of torch's."""
    torch.nn.functional.conv2d = conv2d
