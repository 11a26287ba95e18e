"""A file of a LoRA or one of its kin: what kind it is, and how much of it a model has a place for."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ...core.errors import UserError
from ..files.empty import without_text_model
from ..files.weights import WeightFile
from .lora_kinds import EXACT, LORA, AdapterLayer, changed_bias, changed_weight, split
from .lora_names import Target, targets
from .plain_lora import Lora, read_by_diffusers

if TYPE_CHECKING:
    from ..files.architecture import Architecture

PEFT_MAGNITUDE = re.compile(r"lora_magnitude_vector(\.\w+)?(\.weight)?")
"""A DoRA's magnitudes as peft names them, which diffusers reads."""
NOT_READ = (ValueError, LookupError, RuntimeError, AssertionError, AttributeError, TypeError, ArithmeticError)
"""Errors in which diffusers' converters end for files that they were not made for."""
NAMED = 3
"""Number of layers that a message names."""


@dataclass(frozen=True)
class Fit:
    """How much of a file belongs to a model.

    Attributes:
        applied: Layers by their name in the file -> what they change.
        left_out: Layers, and other tensors, for which the model has no place.
        unlike: Of those, the ones whose size is another, with the reason.
    """

    applied: Mapping[str, Target]
    left_out: Sequence[str]
    unlike: Sequence[str] = ()

    @property
    def whole(self) -> bool:
        """True if nothing is left out."""
        return not self.left_out

    @property
    def modules(self) -> set[str]:
        """Return all that is changed, as ``text_encoder.encoder.layers.0.mlp.fc1``."""
        targets = self.applied.values()
        return {f"{part}.{without_text_model(path)}" for target in targets for part, path in target.modules}


@dataclass(frozen=True)
class AdapterFile:
    """The header of one adapter's file.

    Attributes:
        name: As the user wrote it.
        file: The file.
        layers: Layer -> ending of a tensor's name -> the tensor's name.
        tokens: Names of trained tokens.
        unknown: Names that belong to no kind of adapter.
    """

    name: str
    file: WeightFile
    layers: Mapping[str, Mapping[str, str]]
    tokens: Sequence[str]
    unknown: Sequence[str]

    @classmethod
    def open(cls, name: str, path: Path) -> AdapterFile:
        """Read the header of an adapter. Raises UserError when the file is no safetensors file."""
        file = WeightFile.open(path)
        return cls(name, file, *split(file.entries))

    @property
    def kinds(self) -> set[str]:
        """The kinds of its layers."""
        return {kind for layer in self._shapes() for kind in layer.kinds}

    @property
    def needs_exact(self) -> bool:
        """True if diffusers cannot read its kind."""
        leaves = {leaf for layer in self.layers.values() for leaf in layer if not PEFT_MAGNITUDE.fullmatch(leaf)}
        return any(kind != LORA for kind in AdapterLayer("", dict.fromkeys(leaves)).kinds) or "scalar" in leaves  # type: ignore[arg-type]

    def check_kind(self, architecture: Architecture, *, fused: bool) -> None:
        """Raise UserError unless its kind can be fused, or attached where it is not `fused`."""
        refused = sorted(self.kinds - set(EXACT))
        if refused:
            raise UserError(
                f"LoRA {self.name!r} is of the kind {', '.join(refused)}, which is not read",
                "merge it into the model with the tool that it was made with, and name the merged model",
            )
        if self.needs_exact and not fused:
            self.refuse_beside()

    def refuse_beside(self) -> NoReturn:
        """Raise UserError for a kind that can be fused, and not attached beside others."""
        kinds = ", ".join(sorted(self.kinds))
        raise UserError(
            f"LoRA {self.name!r} is of the kind {kinds}, which can be fused into the teacher but not used beside a "
            "student or as its beginning",
            "name it under teacher_lora, or convert it to a plain LoRA",
        )

    def fit(self, architecture: Architecture, networks: Mapping[str, Any], *, fused: bool) -> Fit:
        """Return which of its layers change something of `networks`, which are on the meta device."""
        config = networks[architecture.denoiser].config
        table = targets(architecture, networks, config)
        applied, unlike, foreign = {}, {}, []
        for layer in self._shapes():
            target = table.get(layer.stem)
            if target is None:
                foreign.append(layer.stem)
            elif problem := _misfit(layer, target, networks):
                unlike[layer.stem] = problem
            else:
                applied[layer.stem] = target
        if foreign and not unlike and not self.needs_exact and self.by_diffusers(1.0, architecture, networks):
            applied, foreign = dict.fromkeys(self.layers, Target()), []
        left_out = [*foreign, *unlike, *self.unknown, *self.tokens]
        return Fit(applied, left_out, list(unlike.values()))

    def _shapes(self) -> Iterator[AdapterLayer]:
        for stem, leaves in self.layers.items():
            yield AdapterLayer(stem, {leaf: self.file.shape(name) for leaf, name in leaves.items()})

    def by_diffusers(
        self, weight: float, architecture: Architecture, networks: Mapping[str, Any], *, whole: Collection[str] = ()
    ) -> Lora | None:
        """Return the LoRA as diffusers reads it; None unless it finds a module of the networks for every layer, and
        all modules that make the LoRA `whole`.
        """
        try:
            lora = read_by_diffusers(self.name, weight, architecture, networks[architecture.denoiser].config)
        except NOT_READ:
            return None
        found = {_module_of(key) for key in lora.state if not key.endswith(".alpha")}
        modules = ((part, path) for part, network in networks.items() for path, _ in network.named_modules())
        known = {f"{part}.{without_text_model(path)}" for part, path in modules}
        return lora if len(found) >= len(self.layers) and found <= known and found.issuperset(whole) else None

    def read(self, stems: Iterable[str]) -> Iterator[AdapterLayer]:
        """Read the tensors of these layers."""
        import torch

        adapter = self._settings()
        for stem in stems:
            leaves = self.layers[stem]
            read = self.file.read(leaves.values(), torch.float32)
            yield AdapterLayer(stem, {leaf: read[name] for leaf, name in leaves.items()}, **stated_scale(adapter, stem))

    def _settings(self) -> Mapping[str, Any]:
        """Return peft's settings, which diffusers writes into the header. Raises UserError where they are none."""
        try:
            found = json.loads(self.file.metadata.get("lora_adapter_metadata", "{}"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"LoRA {self.name!r}: lora_adapter_metadata in its header is no JSON object", "export the LoRA again"
            )
        return found

    def refuse_foreign(self, architecture: Architecture, fit: Fit) -> NoReturn:
        """Raise UserError for a file of which nothing fits."""
        if fit.unlike:
            raise UserError(
                f"LoRA {self.name!r} does not fit this model: {fit.unlike[0]}",
                f"name a LoRA that was trained for {architecture.name} with networks of this size",
            )
        if self.tokens:
            raise UserError(
                f"LoRA {self.name!r} holds trained tokens alone ({', '.join(self.tokens[:NAMED])}): it is an embedding",
                "name a LoRA; embeddings (textual inversion) are not read",
            )
        first = next(iter(self.file.entries), None)
        raise UserError(
            f"LoRA {self.name!r} holds nothing for {architecture.title} (its first tensor is {first!r})",
            f"name a LoRA that was trained for {architecture.name}, in diffusers' or kohya's format",
        )

    def refuse_rest(self, architecture: Architecture, fit: Fit, *, fused: bool) -> None:
        """Raise UserError for a file of which a part does not fit."""
        if fit.whole:
            return
        remedy = f"name a LoRA that was trained for {architecture.name} with networks of this size"
        if fused:
            remedy += f"; strict: false on its entry under teacher_lora applies the {len(fit.applied)} that fit"
        if len(fit.left_out) == len(self.tokens):
            raise UserError(
                f"LoRA {self.name!r} comes with trained tokens, which are not read ({', '.join(self.tokens[:NAMED])})",
                "train without them, or strict: false on its entry under teacher_lora applies the LoRA alone",
            )
        total = len(fit.applied) + len(fit.left_out)
        named = "; ".join(fit.left_out[:NAMED]) + ("; ..." if len(fit.left_out) > NAMED else "")
        why = f", as {fit.unlike[0]}" if fit.unlike else ""
        raise UserError(
            f"LoRA {self.name!r} fits this model in part: of its {total} layers {len(fit.left_out)} have no place in "
            f"it ({named}){why}",
            remedy,
        )


def _misfit(layer: AdapterLayer, target: Target, networks: Mapping[str, Any]) -> str | None:
    """Return why a layer on the meta device cannot change its modules; None where it can."""
    import torch

    modules = [networks[component].get_submodule(path) for component, path in target.modules]
    try:
        changed_weight(layer, torch.cat([module.weight for module in modules]), strength=1.0)
        if layer.get("diff_b", "b_norm") is not None:
            changed_bias(layer, torch.cat([module.bias for module in modules]), strength=1.0)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _module_of(key: str) -> str:
    """Return ``text_encoder.encoder.layers.0.mlp.fc1`` of a tensor's name as diffusers reads it."""
    component, _, inner = re.split(r"\.lora|_lora\.", key)[0].replace(".processor.", ".").partition(".")
    return f"{component}.{without_text_model(inner)}"


def stated_scale(adapter: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """Return alpha and kind of scale of a layer from peft's settings, which diffusers writes into the header."""
    prefix, _, path = stem.partition(".")
    if f"{prefix}.lora_alpha" not in adapter:
        return {}
    patterns = adapter.get(f"{prefix}.alpha_pattern") or {}
    own = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)), None)
    alpha = adapter[f"{prefix}.lora_alpha"] if own is None else own
    return {"alpha": float(alpha), "rank_stabilised": bool(adapter.get(f"{prefix}.use_rslora"))}
