"""LoRAs of another rank, in the names that their file has: nothing of the model is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...core.errors import UserError
from ...core.utils.files import whole_file
from ..comfyui.kohya import write_file
from ..files.finite import check_lora_finite
from .adapter_file import AdapterFile
from .lora_files import lora_file
from .lora_kinds import LORA, AdapterLayer
from .low_rank import Factors, nearest_product

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.plugin_api.lora_tools import LowRank

DOWN = re.compile(r"(.*)(lora_A|down)(.*)")
OTHER = {"lora_A": "lora_B", "down": "up"}
ADAPTER = "lora_adapter_metadata"


def resized(name: str, file: Path, low_rank: LowRank) -> list[Factors]:
    """Write the LoRA `name` with another rank to `file`; return its layers.

    Scales are folded into the second factors: alpha is the rank in what is written.

    Raises:
        UserError: It is of another kind than a plain LoRA.
    """
    read = AdapterFile.open(name, lora_file(name))
    _check(read)
    state: dict[str, Tensor] = read.file.stored(read.tokens)
    found, ranks = [], {}
    for layer in read.read(read.layers):
        check_lora_finite(name, {f"{layer.stem}.{leaf}": tensor for leaf, tensor in layer.tensors.items()})
        for factors, tensors in _layer(read, layer, low_rank):
            state |= tensors
            ranks[layer.stem] = factors.rank
            found.append(factors)
    with whole_file(file) as partial:
        write_file(partial, state, _metadata(read.file.metadata, ranks))
    return found


def _check(read: AdapterFile) -> None:
    kinds = sorted(read.kinds - {LORA})
    if kinds:
        raise UserError(
            f"LoRA {read.name!r} is of the kind {', '.join(kinds)}, which has no rank that can be changed",
            "resize plain LoRAs; others can be merged into a model: distill lora merge BASE LORA",
        )
    if not read.layers or read.unknown:
        first = next(iter(read.unknown), None)
        raise UserError(
            f"LoRA {read.name!r} " + (f"holds what is no LoRA ({first})" if first else "holds no layers"),
            "name a LoRA in diffusers' or kohya's format",
        )


def _layer(read: AdapterFile, layer: AdapterLayer, low_rank: LowRank) -> Iterator[tuple[Factors, dict[str, Tensor]]]:
    """Yield the factors of a layer, and its tensors by their names in the file."""
    names = read.layers[layer.stem]
    for leaf, down in layer.tensors.items():
        match = DOWN.fullmatch(leaf)
        if match is None:
            continue
        partner = f"{match[1]}{OTHER[match[2]]}{match[3]}"
        if partner not in layer.tensors:
            raise UserError(f"LoRA {read.name!r}: {layer.stem} lacks its second factor ({partner})", "export it again")
        up, scalar = layer.tensors[partner], layer.get("scalar")
        scale = layer.scale(len(down)) * (1.0 if scalar is None else float(scalar))
        factors = nearest_product(up.float() * scale, down.float(), low_rank)
        tensors = {names[leaf]: factors.down.to(down.dtype), names[partner]: factors.up.to(up.dtype)}
        if "alpha" in names:
            tensors[names["alpha"]] = torch.tensor(float(factors.rank))
        yield factors, tensors


def _metadata(metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, str]:
    """Return the header's strings with the new ranks; alpha is the rank."""
    found = dict(metadata)
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {stem: rank for stem, rank in ranks.items() if rank != usual}
    said = "Dynamic" if others else str(usual)
    found |= {key: said for key in ("ss_network_dim", "ss_network_alpha") if key in found}
    if "ss_network_args" in found:
        found["ss_network_args"] = json.dumps({"conv_dim": said, "conv_alpha": said})
    if ADAPTER in found:
        found[ADAPTER] = json.dumps(_adapter(json.loads(found[ADAPTER]), usual, others), indent=2, sort_keys=True)
    return found


def _adapter(settings: Mapping[str, Any], usual: int, others: Mapping[str, int]) -> dict[str, Any]:
    """Return peft's settings, each key behind the name of its network, for the new ranks."""
    found = dict(settings)
    for part in {key.partition(".")[0] for key in settings}:
        own = {stem.removeprefix(f"{part}."): rank for stem, rank in others.items() if stem.startswith(f"{part}.")}
        new = {"r": usual, "lora_alpha": usual, "rank_pattern": own, "alpha_pattern": own, "use_rslora": False}
        found |= {f"{part}.{key}": value for key, value in new.items() if f"{part}.r" in settings}
    return found
