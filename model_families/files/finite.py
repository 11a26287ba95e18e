"""Weights that are not finite: NaN or infinity in a file, or values that a half-precision type cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ...core.errors import UserError


def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity; each device is waited for once."""
    checked = [(name, value) for name, value in named if value.is_floating_point() and value.numel()]
    flags: dict[torch.device, list[Tensor]] = {}
    for _, value in checked:
        values = value.detach() if value.element_size() > 1 else value.detach().float()  # of 8 bits there is no minimum
        flags.setdefault(value.device, []).append(torch.isfinite(torch.stack(torch.aminmax(values))).all())
    good = {device: iter(torch.stack(found).tolist()) for device, found in flags.items()}
    return [name for name, value in checked if not next(good[value.device])]


def check_lora_finite(name: str, state: Mapping[str, Tensor]) -> None:
    """Raise UserError if a LoRA's tensors are not finite."""
    bad = not_finite(state.items())
    if bad:
        raise UserError(
            f"LoRA {name!r} holds NaN or infinity in {len(bad)} of its {len(state)} tensors (the first is {bad[0]!r})",
            "name a LoRA that was trained to its end: this one makes noise of every image",
        )


def check_network(name: str, part: str, network: nn.Module, *, loras: bool) -> None:
    """Raise UserError if the weights of a network, as it will compute, are not finite.

    Args:
        name: The model's, as the user wrote it.
        part: The component's, as ``unet``.
        network: In the type of its frozen weights, not yet quantised.
        loras: Whether LoRAs are fused into it.
    """
    named = list(network.named_parameters())
    bad = not_finite(named)
    if not bad:
        return
    dtype = str(dict(named)[bad[0]].dtype).removeprefix("torch.")
    fused = ", lower the weight of each teacher_lora" if loras else ""
    raise UserError(
        f"model {name!r}: its {part} holds NaN or infinity in {len(bad)} of {len(named)} tensors as {dtype} (the first "
        f"is {bad[0]!r})",
        f"restore the file from the model's origin{fused}, or use mixed_precision=bf16 or no if it is float16 that "
        "cannot hold its values",
    )


def check_empty_prompt(embeds: Mapping[str, Tensor], remedy: str) -> None:
    """Raise UserError if the embeddings of the empty prompt, which guidance starts from, are not finite."""
    if bad := not_finite(embeds.items()):
        raise UserError(f"the text encoders make NaN or infinity of the empty prompt ({', '.join(bad)})", remedy)
