"""Students that are smaller than their teacher: which of its blocks they keep, and the weights of those.

A UNet loses pairs of residual and attention layers, transformer layers inside its attentions, or its middle block; what
is left are the first ones of each block and, on the way up, the last pair of each, which alone fits the skip connection
(BK-SDM). Transformers keep blocks evenly spaced, the first and the last among them.

References:
    Kim et al., BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion, arXiv 2305.15798.
    Lee et al., KOALA: Empirical Lessons Toward Memory-Efficient and Fast Diffusion Models, arXiv 2312.04005.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ...core.errors import UserError

Weight = TypeVar("Weight")

PLAIN = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
"""A UNet's block with attention -> the same without."""


def evenly(total: int, kept: int) -> list[int]:
    """Return `kept` of the indices below `total`, evenly spaced, first and last among them; the last alone for one."""
    return [total - 1] if kept == 1 else [round(number * (total - 1) / (kept - 1)) for number in range(kept)]


def _per_level(value: Any, levels: int, key: str) -> list[int]:
    """Return a list with a number for each level, from one for all or one for each."""
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels or not all(isinstance(each, int) for each in values):
        raise UserError(
            f"family_config.{key} = {value}: the network has {levels} levels, each with one number of its own",
            f"give one number, or {levels} of them, from the finest level to the coarsest",
        )
    return values


def not_more(key: str, asked: int, there: int) -> None:
    """Raise UserError where the setting `key` asks for more than there is."""
    if asked > there:
        raise UserError(
            f"family_config.{key} = {asked}: the teacher has {there}",
            f"give a number up to {there}; a student can leave blocks out, not have more",
        )


def _kinds(kinds: Sequence[str], depth: Sequence[int]) -> tuple[str, ...]:
    """Return the types of blocks, without attention where its depth is 0."""
    return tuple(kind if each else PLAIN.get(kind, kind) for kind, each in zip(kinds, depth, strict=True))


def smaller_unet_config(
    config: Mapping[str, Any], *, layers: int | Sequence[int] | None, depth: int | Sequence[int] | None, middle: bool
) -> dict[str, Any]:
    """Return a UNet's config with fewer blocks.

    Args:
        config: The teacher's.
        layers: Residual layers of each level on the way down (one more on the way up); None: as many as the teacher's.
        depth: Transformer layers in the attentions of each level; 0: no attention there; None: the teacher's.
        middle: Whether the middle block is kept.

    Raises UserError for more than the teacher has, and for UNets whose levels are not one number each.
    """
    levels = len(config["block_out_channels"])
    own_layers = _per_level(config.get("layers_per_block", 2), levels, "student_layers_per_block")
    own_depth = _per_level(config.get("transformer_layers_per_block", 1), levels, "student_transformer_layers")
    attends = [kind in PLAIN for kind in config["down_block_types"]]
    own_depth = [each if there else 0 for each, there in zip(own_depth, attends, strict=True)]
    new_layers = own_layers if layers is None else _per_level(layers, levels, "student_layers_per_block")
    new_depth = own_depth if depth is None else _per_level(depth, levels, "student_transformer_layers")
    if isinstance(depth, int):  # of the levels that have attention
        new_depth = [min(new, own) for new, own in zip(new_depth, own_depth, strict=True)]
    for asked, there in zip(new_layers, own_layers, strict=True):
        not_more("student_layers_per_block", asked, there)
    for asked, there in zip(new_depth, own_depth, strict=True):
        not_more("student_transformer_layers", asked, there)
    if middle and own_depth[-1] and not new_depth[-1]:
        raise UserError(
            "family_config.student_transformer_layers is 0 at the coarsest level, whose depth the middle block shares",
            "keep one layer there, or set family_config.student_mid_block to false",
        )
    return {
        **config,
        "layers_per_block": new_layers,
        "transformer_layers_per_block": [max(1, each) for each in new_depth],
        "down_block_types": _kinds(config["down_block_types"], new_depth),
        "up_block_types": _kinds(config["up_block_types"], new_depth[::-1]),
        "mid_block_type": config.get("mid_block_type", "UNetMidBlock2DCrossAttn") if middle else None,
    }


def kept_unet_weights(
    state: Mapping[str, Weight], config: Mapping[str, Any], smaller: Mapping[str, Any]
) -> dict[str, Weight]:
    """Return the weights of a UNet that the smaller one keeps, under the smaller one's names.

    Args:
        state: The teacher's weights, or anything else by their names.
        config: The teacher's config.
        smaller: The student's config, from :func:`smaller_unet_config`.
    """
    levels = len(config["block_out_channels"])
    own = _per_level(config.get("layers_per_block", 2), levels, "")
    kept = _per_level(smaller["layers_per_block"], levels, "")
    depth = list(smaller["transformer_layers_per_block"])
    found: dict[str, Weight] = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "mid_block" and smaller["mid_block_type"] is None:
            continue
        if parts[0] in ("down_blocks", "up_blocks"):
            number, up = int(parts[1]), parts[0] == "up_blocks"
            level = levels - 1 - number if up else number
            kinds = smaller["up_block_types" if up else "down_block_types"]
            if parts[2] == "attentions" and "Attn" not in kinds[number]:
                continue
            if parts[2] in ("attentions", "resnets"):
                place = _place(int(parts[3]), own[level] + up, kept[level] + up, last=up)
                if place is None:
                    continue
                parts[3] = str(place)
        else:
            level = levels - 1
        if "transformer_blocks" in parts and int(parts[parts.index("transformer_blocks") + 1]) >= depth[level]:
            continue
        found[".".join(parts)] = value
    return found


def _place(index: int, total: int, kept: int, *, last: bool) -> int | None:
    """Return the position of layer `index` of `total` among those kept: the first ones, and the last one if `last`."""
    if last and index == total - 1:
        return kept - 1
    return index if index < kept - int(last) else None


def smaller_transformer_config(config: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a transformer's config with as many blocks as `kept` (key of the config -> indices) has."""
    changed: dict[str, Any] = {key: len(indices) for key, indices in kept.items()}
    if config.get("dual_attention_layers"):
        dual = set(config["dual_attention_layers"])
        numbered = enumerate(kept.get("num_layers", range(config["num_layers"])))
        changed["dual_attention_layers"] = tuple(new for new, old in numbered if old in dual)
    return {**config, **changed}


def kept_transformer_weights(state: Mapping[str, Weight], kept: Mapping[str, Sequence[int]]) -> dict[str, Weight]:
    """Return a transformer's weights of the blocks in `kept` (name of the list -> indices) and all others."""
    positions = {name: {old: new for new, old in enumerate(indices)} for name, indices in kept.items()}
    found: dict[str, Weight] = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] in positions:
            place = positions[parts[0]].get(int(parts[1]))
            if place is None:
                continue
            parts[1] = str(place)
        found[".".join(parts)] = value
    return found
