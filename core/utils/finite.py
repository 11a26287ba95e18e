"""Values that are not finite (NaN or infinity): in one entry they would spoil every batch that has it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def finite_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return which entries hold finite values alone, boolean, shape (n,); `tensors` are of shape (n, ...) each."""
    count = len(next(iter(tensors.values())))
    good = torch.ones(count, dtype=torch.bool)
    for value in tensors.values():
        if value.is_floating_point():
            good &= torch.isfinite(value.reshape(count, -1)).all(1).cpu()
    return good
