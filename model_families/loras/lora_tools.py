"""What families of diffusers' models do with files of LoRAs: the difference of two models, sums, fused models."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from ...core.errors import UserError
from ...core.plugin_api.lora_tools import LoraFormat, LoraReport, LoraTarget, LowRank
from ...core.utils.files import whole_file
from ...core.utils.progress import working
from ...core.utils.safetensors_header import sort_metadata
from ..bases import export as exporting
from ..bases.model import DiffusersModel
from ..comfyui.kohya import export_kohya, no_form
from ..files.empty import empty_network
from .fusing import adapter_factors
from .lora_files import WEIGHTS
from .lora_resize import resized
from .low_rank import Factors, nearest, nearest_product
from .plain_lora import Lora

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.plugin_api.family import ExtraLora, Precision
    from ..files.architecture import Architecture
    from ..files.source import Source

NAMED = 3
"""Number of tensors that a line about what is left out names."""
STORED: Mapping[str, Precision] = {"F16": "float16", "BF16": "bfloat16"}


@dataclass
class _Difference:
    """The difference of two denoisers, layer by layer.

    Attributes:
        layers: Path of a module -> its part of the LoRA.
        other: Tensor that no LoRA holds -> sum of the squares of its difference.
    """

    layers: dict[str, Factors] = field(default_factory=dict)
    other: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Sum of the squares of the whole difference."""
        return sum(one.total for one in self.layers.values()) + sum(self.other.values())

    def lines(self) -> Iterator[str]:
        """Yield what of the denoiser is not in the LoRA."""
        changed = sorted((name for name, square in self.other.items() if square), key=lambda name: -self.other[name])
        if changed:
            share = math.sqrt(sum(self.other.values()) / self.total)
            named = ", ".join(changed[:NAMED]) + (", ..." if len(changed) > NAMED else "")
            yield f"{len(changed)} tensors of the denoiser that differ ({share:.1%} of the norm): {named}"


class LoraFiles(DiffusersModel):
    """The tools of a family whose models diffusers reads; a base of :class:`.DiffusersFamily`."""

    @classmethod
    def kohya_problem(cls) -> str | None:
        return no_form(cls.architecture) if cls.architecture.kohya is None else None

    def export_kohya(self, student: Path, file: Path, *, title: str, dtype: Precision | None = None) -> list[str]:
        return export_kohya(
            self.architecture,
            self.denoiser_config,
            student,
            file,
            title=title,
            dtype=None if dtype is None else getattr(torch, dtype),
            predicts_v=self.prediction_type == "v_prediction",
        )

    def extract_lora(
        self,
        tuned: Self,
        target: LoraTarget,
        low_rank: LowRank,
        *,
        modules: Sequence[str] | None = None,
    ) -> LoraReport:
        part = self.architecture.denoiser
        only_tuned = _compare(self, tuned)
        with working("comparing the two models, layer by layer"):
            found = _difference(self, tuned, self.lora_targets if modules is None else modules, low_rank, target.dtype)
            outside = list(_outside(self._source, tuned._source))
        if not found.layers or not found.total:
            raise UserError(
                f"model {tuned.settings.source!r} has the denoiser of {self.settings.source!r}: there is no difference",
                "name the base first, and the model that was made from it second"
                + (f" (they differ in {'; '.join(outside)})" if outside else ""),
            )
        _write(self, target, {part: found.layers}, about={"extracted": "difference of two models"})
        added = [f"tensors of {tuned.settings.source} alone: {', '.join(only_tuned)}"] if only_tuned else []
        return _report(found.layers.values(), [*found.lines(), *added, *outside])

    @classmethod
    def resize_lora(cls, name: str, file: Path, low_rank: LowRank) -> LoraReport:
        return _report(resized(name, file, low_rank), [])

    def combine_loras(
        self,
        loras: Sequence[ExtraLora],
        target: LoraTarget,
        low_rank: LowRank,
    ) -> LoraReport:
        read = [self.loras.plain(lora.path, lora.weight) for lora in loras]
        _refuse_magnitudes(read)
        sums = {part: _sums(self, part, read, low_rank) for part in self.loras.networks}
        sums = {part: layers for part, layers in sums.items() if layers}
        if target.form is LoraFormat.KOHYA and len(sums) > 1:
            raise UserError(
                "kohya's format is written for the denoiser alone, and a LoRA here changes a text encoder too",
                "write it with --format diffusers",
            )
        _write(self, target, sums, about={"merged": f"{len(loras)} LoRAs"})
        return _report([one for layers in sums.values() for one in layers.values()], [])

    def stored_precision(self) -> Precision:
        return stored_precision(self._source, self.architecture.denoiser)


def stored_precision(source: Source, part: str) -> Precision:
    """Return the type in which the files hold most tensors of a network; float32 for types of 8 bits."""
    kinds = [file.entries[stored]["dtype"] for file, names in source.tensor_files(part) for stored in names.values()]
    return STORED.get(max(set(kinds), key=kinds.count), "float32")


# -- the difference of two models -------------------------------------------------------------------------------------


def _compare(base: DiffusersModel, tuned: DiffusersModel) -> list[str]:
    """Check the files of both models; return the denoiser's tensors that the second one alone has.

    Raises:
        UserError: They are not of one architecture and size.
    """
    for one in (base, tuned):
        one._source.check(without=("vae",))
        one._source.check_weights([one.architecture.denoiser])
    own, other = (
        {name: tuple(weight.shape) for name, weight in _empty(one).state_dict().items()} for one in (base, tuned)
    )
    unlike = [name for name, shape in own.items() if other.get(name) != shape]
    if unlike:
        there = other.get(unlike[0], "missing")
        raise UserError(
            f"model {tuned.settings.source!r} is no relative of {base.settings.source!r}: {len(unlike)} of {len(own)} "
            f"tensors of its denoiser are of another size or missing ({unlike[0]} is {there} for {own[unlike[0]]})",
            "name two models of the same architecture: a base, and what was trained from it",
        )
    return [name for name in other if name not in own]


def _empty(family: DiffusersModel) -> Any:
    return empty_network(family.architecture, family.architecture.denoiser, family.denoiser_config)


def _difference(
    base: DiffusersModel, tuned: DiffusersModel, modules: Sequence[str], low_rank: LowRank, dtype: Precision
) -> _Difference:
    """Return the difference, with one layer of each model in memory at a time."""
    network, found = _empty(base), _Difference()
    adapted = {f"{path}.weight": path for path, module in network.named_modules() if _is_adapted(path, module, modules)}
    names = list(network.state_dict())
    pairs = zip(base._source.wide_weights(names), tuned._source.wide_weights(names), strict=True)
    for (name, before), (_, after) in pairs:
        change = after - before
        square = float(change.double().square().sum())
        if not math.isfinite(square):
            raise UserError(
                f"{name} of {base.settings.source!r} or {tuned.settings.source!r} holds NaN or infinity",
                "restore the file from the model's origin",
            )
        if name in adapted:
            factors = nearest(change, low_rank)
            found.layers[adapted[name]] = _as_type(factors, getattr(torch, dtype))
        else:
            found.other[name] = square
    return found


def _is_adapted(path: str, module: Any, modules: Sequence[str]) -> bool:
    if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
        return False
    return not modules or any(path == one or path.endswith(f".{one}") for one in modules)


def _as_type(factors: Factors, dtype: torch.dtype) -> Factors:
    return Factors(factors.down.to(dtype), factors.up.to(dtype), factors.total, factors.kept)


def _outside(base: Source, tuned: Source) -> Iterator[str]:
    """Yield which text encoders and autoencoders differ, and by how much."""
    for part in (*base.architecture.encoders, "vae"):
        if not (base.has(part) and tuned.has(part)):
            continue
        change, norm = _distance(base, tuned, part)
        if change:
            yield f"{part} differs by {change / norm:.2%} of its norm, which is not in the LoRA"


def _distance(base: Source, tuned: Source, part: str) -> tuple[float, float]:
    """Return the norms of the difference of a network, and of the network."""
    change = norm = 0.0
    for before, after in _pairs(base, tuned, part):
        wide = before.double()
        change += float((after.double() - wide).square().sum()) if before.shape == after.shape else float("inf")
        norm += float(wide.square().sum())
    return math.sqrt(change), math.sqrt(norm)


def _pairs(base: Source, tuned: Source, part: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of both, one at a time where both files name them alike, as two folders do."""
    files = [{own: (file, stored) for file, names in one.tensor_files(part) for own, stored in names.items()}
             for one in (base, tuned)]  # fmt: skip
    if files[0].keys() == files[1].keys():
        for name in files[0]:
            yield tuple(next(iter(file.read([stored], torch.float32).values()))  # type: ignore[misc]
                        for file, stored in (one[name] for one in files))  # fmt: skip
        return
    own, other = base.stored(part), tuned.stored(part)
    yield from ((own[name], other[name]) for name in own.keys() & other.keys())


# -- several LoRAs as one ---------------------------------------------------------------------------------------------


def _refuse_magnitudes(loras: Sequence[Lora]) -> None:
    for lora in loras:
        if any("magnitude" in name for name in lora.state):
            raise UserError(
                f"LoRA {lora.name!r} is a DoRA: its change depends on the weights of the model, so no sum is defined",
                "merge it into the model: leave --as-lora out",
            )


def _sums(family: DiffusersModel, part: str, loras: Sequence[Lora], low_rank: LowRank) -> dict[str, Factors]:
    """Return the sum of LoRAs by the paths of the modules of a network."""
    pairs = adapter_factors(family.architecture, part, family.loras.networks[part], loras)
    keeps = low_rank.rank is None and low_rank.energy is None
    found = {}
    for path, each in pairs.items():
        up, down = torch.cat([up for up, _ in each], dim=1), torch.cat([down for _, down in each])
        found[path] = _whole(up, down) if keeps else nearest_product(up, down, low_rank)
    return found


def _whole(up: Tensor, down: Tensor) -> Factors:
    return Factors(down, up, 1.0, 1.0)


# -- writing ----------------------------------------------------------------------------------------------------------


def _write(
    family: DiffusersModel, target: LoraTarget, parts: Mapping[str, Mapping[str, Factors]], *, about: Mapping[str, str]
) -> None:
    """Write a LoRA by the exporters of students, completely or not at all."""
    dtype = getattr(torch, target.dtype)
    with tempfile.TemporaryDirectory() as folder, working(f"writing {target.file.name}"):
        student = Path(folder)
        _in_diffusers_names(family.architecture, student, parts, about, dtype)
        if target.form is LoraFormat.KOHYA:
            export_kohya(
                family.architecture, family.denoiser_config, student, target.file, title=target.file.stem, dtype=dtype,
                predicts_v=family.prediction_type == "v_prediction",
            )  # fmt: skip
            return
        sort_metadata(student / WEIGHTS)
        with whole_file(target.file) as partial:
            partial.write_bytes((student / WEIGHTS).read_bytes())


def _in_diffusers_names(
    architecture: Architecture,
    folder: Path,
    parts: Mapping[str, Mapping[str, Factors]],
    about: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    layers, configs = {}, {}
    for part, found in parts.items():
        tensors = {f"{path}.lora_{end}.weight": tensor.to(dtype).contiguous() for path, one in found.items()
                   for end, tensor in (("A", one.down), ("B", one.up))}  # fmt: skip
        layers[part], configs[part] = tensors, _config({path: one.rank for path, one in found.items()})
    exporting.save_layers(architecture, folder, layers, configs, dict(about))


def _config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return peft's settings of a LoRA whose scale is 1: alpha is the rank of each layer."""
    from peft import LoraConfig

    counted = list(ranks.values())
    usual = max(set(counted), key=counted.count)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, target_modules=list(ranks), rank_pattern=others, alpha_pattern=dict(others)
    )
    return exporting.in_order(config.to_dict())


def _report(layers: Any, left_out: Sequence[str]) -> LoraReport:
    layers = list(layers)
    total, kept = sum(one.total for one in layers), sum(one.kept for one in layers)
    ranks = [one.rank for one in layers]
    return LoraReport(len(layers), (min(ranks), max(ranks)), math.sqrt(kept / total) if total else 1.0, left_out)
