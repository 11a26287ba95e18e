"""SDXL's UNet: its calls, its inner activations, and copies of it to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.second_time import PREFIX, add_second_time
from ._sdxl_pictures import guidance_scale_embedding
from ._sdxl_source import empty_unet

GUIDANCE_DIM = 256
"""``time_cond_proj_dim`` of a student with a guidance embedding."""


def call_unet(
    unet: Any, x_t: Tensor, time: Tensor, cond: Mapping[str, Tensor], *, guidance: Tensor | None = None
) -> Tensor:
    """Raw output (B, C, h, w); arguments as of :meth:`ModelFamily.predict`."""
    dtype = unet.conv_in.weight.dtype
    width = unet.config.time_cond_proj_dim
    if (guidance is None) != (width is None):
        raise ValueError(
            "this network has no guidance embedding"
            if width is None
            else "this network takes the guidance scale as an input: pass guidance"
        )
    embedding = None if guidance is None else guidance_scale_embedding(guidance, width).to(dtype)
    return unet(
        x_t.to(dtype),
        time,
        encoder_hidden_states=cond["prompt_embeds"].to(dtype),
        timestep_cond=embedding,
        added_cond_kwargs={"text_embeds": cond["pooled_prompt_embeds"].to(dtype), "time_ids": cond["time_ids"]},
        return_dict=False,
    )[0]


def copy_unet(teacher: Any, *, guidance_embedding: bool, second_time: bool) -> Any:
    """A trainable fp32 copy; embeddings that the teacher lacks start at zero."""
    config = dict(teacher.config)
    own = {name: value for name, value in teacher.state_dict().items() if not name.startswith(PREFIX)}
    state = {name: value.detach().to(torch.float32, copy=True) for name, value in own.items()}
    if guidance_embedding and config.get("time_cond_proj_dim") is None:
        config["time_cond_proj_dim"] = GUIDANCE_DIM
        width = teacher.time_embedding.linear_1.in_features
        state["time_embedding.cond_proj.weight"] = torch.zeros(width, GUIDANCE_DIM, device=teacher.device)
    student = empty_unet(config)
    student.load_state_dict(state, assign=True)
    if second_time:
        unet_second_time(student, name="student")
    return student.to(memory_format=torch.channels_last).requires_grad_(True).eval()


def unet_second_time(unet: Any, *, name: str) -> nn.Module:
    """The second time `name` of a UNet, added to the output of its time embedding."""
    width = unet.time_embedding.linear_2.out_features
    return add_second_time(unet, name=name, path="time_embedding", width=width)


class _HalfWay(Exception):
    """The middle block is done: no error, it ends a forward pass."""


def unet_features(unet: Any, x_t: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs of the down blocks and the middle block; the up blocks are not computed."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0])  # (hidden states, what skips over to the up blocks)

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output)
        raise _HalfWay

    handles = [block.register_forward_hook(keep) for block in unet.down_blocks]
    handles.append(unet.mid_block.register_forward_hook(stop))
    try:
        call_unet(unet, x_t, time, cond)
    except _HalfWay:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def unet_feature_channels(unet: Any) -> list[int]:
    """Channels of what :func:`unet_features` returns."""
    widths = list(unet.config.block_out_channels)
    return [*widths, widths[-1]]
