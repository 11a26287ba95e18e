"""The base of families whose network takes one sample at a time: its pipeline makes another of it beside others."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.diffusion.second_time import second_time_input
from ...core.plugin_api.family_parts import FIRST_HALF, Blocks
from ...core.utils.full_precision import compute_type, input_type
from ..calls.networks import check_guidance
from .transformer import TransformerFamily

if TYPE_CHECKING:
    from ...core.plugin_api.batch import Conditioning


class OneByOneFamily(TransformerFamily):
    """A family whose network is called for each sample alone, also in a batch."""

    one_by_one: ClassVar[bool] = True

    @abstractmethod
    def predict_one(self, network: Any, x_t: Tensor, told: Tensor, cond: Conditioning) -> Tensor:
        """Return the network's output for one sample, (1, C, h, w).

        Args:
            network: The network.
            x_t: Its latents (1, C, h, w), of the type of the network's inputs.
            told: Its time (1,) in the schedule's network time.
            cond: Its conditioning, (1, ...) each; states are of the type of the network's weights.
        """

    def predict(
        self,
        network: nn.Module,
        x_t: Tensor,
        time: Tensor,
        cond: Conditioning,
        *,
        guidance: Tensor | None = None,
        second_time: Tensor | None = None,
    ) -> Tensor:
        check_guidance(guidance, taken=False)
        dtype = self.weight_type(network)
        latents = x_t.to(input_type(dtype, x_t.device))
        # rounded as in a pipeline of that type, also for a student whose own weights are fp32
        told = time.to(compute_type(dtype, x_t.device))
        typed = {name: value if name.endswith("mask") else value.to(dtype) for name, value in cond.items()}
        found = []
        for one in samples(len(x_t)):
            later = None if second_time is None else second_time[one]
            with _masks(x_t), second_time_input(network, time[one], later):
                found.append(self.predict_one(network, latents[one], told[one], _of(typed, one)))
        return torch.cat(found)

    def features(
        self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, *, blocks: Blocks = FIRST_HALF
    ) -> list[Tensor]:
        each = []
        for one in samples(len(x_t)):
            each.append(super().features(network, x_t[one], time[one], _of(cond, one), blocks=blocks))
        return [torch.cat(level) for level in zip(*each, strict=True)]


def samples(count: int) -> list[slice]:
    """Return each of `count` samples as a batch of its own."""
    return [slice(one, one + 1) for one in range(count)]


def _of(cond: Conditioning, one: slice) -> dict[str, Tensor]:
    return {name: value[one] for name, value in cond.items()}


def _masks(x: Tensor) -> AbstractContextManager[Any]:
    return _MasksOnMeta() if x.is_meta else nullcontext()


class _MasksOnMeta(TorchFunctionMode):
    """Lets masks that keep their values, on the CPU, choose between tensors of the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.where and isinstance(args[1], Tensor) and args[1].is_meta:
            args = (args[0].to("meta"), *args[1:])
        return func(*args, **(kwargs or {}))
