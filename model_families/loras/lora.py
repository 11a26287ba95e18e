"""LoRAs: compared with the networks, read for being fused into the teacher, attached beside a student's.

What diffusers reads whole is left to it. Kinds that it cannot read (:mod:`.lora_kinds`), and LoRAs of which only a
part is wanted, are computed here. :mod:`.fusing` fuses either.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ..files.finite import check_lora_finite
from ..files.reading import quiet_libraries
from .adapter_file import AdapterFile, Fit
from .lora_files import lora_file
from .lora_kinds import LORA, AdapterLayer, changed_bias, changed_weight
from .plain_lora import Lora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..files.architecture import Architecture
    from .lora_names import Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExactLora:
    """One adapter of any kind that is computed here, on the modules that it changes.

    Attributes:
        name: As the user wrote it.
        weight: Factor of its contribution.
        layers: Its layers, and where they belong.
    """

    name: str
    weight: float
    layers: Sequence[tuple[AdapterLayer, Target]]

    def has(self, prefix: str) -> bool:
        """Return True if it changes the component `prefix`."""
        return any(component == prefix for _, target in self.layers for component, _ in target.modules)


AnyLora = Lora | ExactLora


def fuse_layer(layer: AdapterLayer, modules: Sequence[Any], strength: float, *, swapped: bool = False) -> None:
    """Change the weights of `modules`, which one layer of a file changes together, in float32, in place.

    `swapped`: the first half of the layer's rows is the second of the modules'.
    """
    import torch

    with torch.no_grad():
        rows = [len(module.weight) for module in modules]
        weight = _halves(torch.cat([module.weight for module in modules]), swapped=swapped)
        weight = _halves(changed_weight(layer, weight, strength=strength), swapped=swapped)
        for module, piece in zip(modules, weight.split(rows), strict=True):
            module.weight.data.copy_(piece)
        if layer.get("diff_b", "b_norm") is not None:
            bias = _halves(torch.cat([module.bias for module in modules]), swapped=swapped)
            bias = _halves(changed_bias(layer, bias, strength=strength), swapped=swapped)
            for module, piece in zip(modules, bias.split(rows), strict=True):
                module.bias.data.copy_(piece)


def _halves(rows: Tensor, *, swapped: bool) -> Tensor:
    """Return rows with the second half first where they are `swapped`."""
    import torch

    return torch.cat(rows.chunk(2)[::-1]) if swapped else rows


def check_lora(
    name: str, architecture: Architecture, networks: Mapping[str, Any], *, fused: bool, strict: bool = True
) -> tuple[AdapterFile, Fit]:
    """Compare a LoRA with the networks on the meta device; no values are read.

    Args:
        name: The LoRA, as the user wrote it.
        architecture: The model's.
        networks: The denoiser and the text encoders that a LoRA may change, by their names in the pipeline.
        fused: Whether it is fused into the weights; else it is attached beside others, which only plain LoRAs can be.
        strict: Whether all of it must fit.

    Raises:
        UserError: It is of a kind that cannot be used so, or changes what the model has not.
    """
    file = AdapterFile.open(name, lora_file(name))
    file.check_kind(architecture, fused=fused)
    fit = file.fit(architecture, networks, fused=fused)
    if not fit.applied:
        file.refuse_foreign(architecture, fit)
    if strict:
        file.refuse_rest(architecture, fit, fused=fused)
    return file, fit


def read_lora(
    name: str,
    weight: float,
    architecture: Architecture,
    networks: Mapping[str, Any],
    *,
    fused: bool,
    strict: bool = True,
) -> AnyLora:
    """Read the LoRA `name` for the networks that :func:`check_lora` compares it with. Raises UserError as that does."""
    file, fit = check_lora(name, architecture, networks, fused=fused, strict=strict)
    if fit.whole and not file.needs_exact:
        lora = file.by_diffusers(weight, architecture, networks, whole=fit.modules)
        if lora is not None:
            check_lora_finite(name, lora.state)
            return lora
    if not fit.whole:
        left = ", ".join(fit.left_out[:3]) + (", ..." if len(fit.left_out) > 3 else "")
        logger.warning(
            "LoRA %s is applied in part, as strict is false: %d of %d layers; left out: %s",
            name, len(fit.applied), len(fit.applied) + len(fit.left_out), left,
        )  # fmt: skip
    layers = [(layer, fit.applied[layer.stem]) for layer in file.read(fit.applied)]
    for layer, _ in layers:
        check_lora_finite(name, {f"{layer.stem}.{leaf}": tensor for leaf, tensor in layer.tensors.items()})
    if fused:
        return ExactLora(name, weight, layers)
    if file.kinds != {LORA}:
        file.refuse_beside()
    return _in_peft_names(name, weight, layers, networks)


def _in_peft_names(
    name: str, weight: float, layers: Sequence[tuple[AdapterLayer, Target]], networks: Mapping[str, Any]
) -> Lora:
    """Return plain layers of a naming that diffusers does not know by the modules' own names, their scale folded in."""
    state: dict[str, Tensor] = {}
    for layer, target in layers:
        down, up = layer.factors()
        rows = [len(networks[component].get_submodule(path).weight) for component, path in target.modules]
        up = _halves(up * layer.scale(len(down)), swapped=target.swapped)
        for (component, path), piece in zip(target.modules, up.split(rows), strict=True):
            state[f"{component}.{path}.lora_A.weight"] = down.clone()
            state[f"{component}.{path}.lora_B.weight"] = piece.contiguous()
    return Lora(name, weight, state, None, None)


def attach(architecture: Architecture, components: Mapping[str, nn.Module], loras: Mapping[str, Lora]) -> None:
    """Put LoRAs beside each other as adapters by name, all active at their weights."""
    pipeline = _shell(architecture, components)
    for adapter, lora in loras.items():
        _attach(pipeline, architecture, lora, adapter, [name for name in components if lora.has(name)])
    used = {adapter: lora for adapter, lora in loras.items() if any(lora.has(name) for name in components)}
    if used:
        pipeline.set_adapters(list(used), [lora.weight for lora in used.values()])


def _attach(pipeline: Any, architecture: Architecture, lora: Lora, adapter: str, touched: Sequence[str]) -> None:
    shared: dict[str, Any] = {"network_alphas": lora.alphas, "adapter_name": adapter, "metadata": lora.metadata}
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            for name in touched:
                component, state = getattr(pipeline, name), dict(lora.state)
                if name == architecture.denoiser:
                    component.load_lora_adapter(state, prefix=name, **shared)
                else:
                    pipeline.load_lora_into_text_encoder(state, text_encoder=component, prefix=name, **shared)
                _check_attached(lora, name, component, adapter)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"LoRA {lora.name!r} does not fit this model: {str(error).strip().splitlines()[0]}",
            f"name a LoRA that was trained for {architecture.name} with networks of this size",
        ) from error


def _check_attached(lora: Lora, name: str, component: nn.Module, adapter: str) -> None:
    """Raise RuntimeError unless every layer of the LoRA has become an adapter."""
    attached = sum(adapter in getattr(module, "lora_A", ()) for module in component.modules())
    if attached != lora.num_layers(name):
        raise RuntimeError(f"{attached} of {lora.num_layers(name)} layers were applied to {name}")


def _shell(architecture: Architecture, components: Mapping[str, nn.Module]) -> Any:
    """Return a pipeline around some networks only, for diffusers' LoRA functions."""
    with quiet_libraries():
        return architecture.shell(**components)
