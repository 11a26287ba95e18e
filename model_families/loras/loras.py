"""The LoRAs that a run names: those of its teacher, and the one that its student begins with."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ..files.empty import empty_network
from .adapter_file import AdapterFile, Fit
from .fusing import fused_weights
from .lora import AnyLora, check_lora, read_lora
from .plain_lora import Lora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...core.plugin_api.family import ModelSettings
    from ..files.architecture import Architecture
    from ..files.source import Source

logger = logging.getLogger(__name__)


@dataclass
class Loras:
    """Reads LoRAs for one model.

    Attributes:
        architecture: The model's.
        source: Its files.
        settings: Name the LoRAs.
        left_out: Text encoders that the run does without.
    """

    architecture: Architecture
    source: Source
    settings: ModelSettings
    left_out: Collection[str]

    @cached_property
    def networks(self) -> dict[str, Any]:
        """The denoiser and the text encoders that a LoRA may change, on the meta device."""
        parts = (self.architecture.denoiser, *self.architecture.lora_encoders)
        return {
            part: empty_network(self.architecture, part, self.source.config(f"{part}/config.json"))
            for part in parts
            if part not in self.left_out and self.source.has(part)
        }

    def check(self) -> None:
        """Raise UserError unless every LoRA of the run fits the model as it is used; reads no values."""
        for name, _ in self.settings.teacher_lora:
            file, fit = self._check_teacher(name)
            if file.needs_exact:
                kinds = ", ".join(sorted(file.kinds))
                logger.info("teacher_lora %s: %d layers (%s) are fused into the teacher", name, len(fit.applied), kinds)
        if self.settings.init_lora is not None:
            check_lora(self.settings.init_lora, self.architecture, self.networks, fused=False)

    def _strict(self, name: str) -> bool:
        return name not in self.settings.partial_loras

    def _check_teacher(self, name: str) -> tuple[AdapterFile, Fit]:
        return check_lora(name, self.architecture, self.networks, fused=True, strict=self._strict(name))

    def read_by_diffusers(self, name: str) -> bool:
        """Return True if plain diffusers fuses this LoRA of the teacher as it is fused here."""
        file, fit = self._check_teacher(name)
        if file.needs_exact or not fit.whole:
            return False
        return file.by_diffusers(1.0, self.architecture, self.networks, whole=fit.modules) is not None

    def teacher(self) -> list[AnyLora]:
        """Read the LoRAs that are fused into the teacher. Raises UserError for one that does not fit."""
        return [
            read_lora(name, weight, self.architecture, self.networks, fused=True, strict=self._strict(name))
            for name, weight in self.settings.teacher_lora
        ]

    def of_encoders(self) -> list[AnyLora]:
        """Read those of the teacher's LoRAs that change a text encoder."""
        return [lora for lora in self.teacher() if any(map(lora.has, self.architecture.lora_encoders))]

    def fuse(self, networks: Mapping[str, nn.Module], loras: Sequence[AnyLora]) -> None:
        """Add LoRAs to the weights of networks, by their names in the pipeline, that are in memory in float32."""
        for part, network in networks.items():
            own = {name: weight.data for name, weight in network.named_parameters()}
            read = partial(_of, own)
            for name, value in fused_weights(self.architecture, part, self.networks[part], loras, read=read):
                own[name].copy_(value)

    def plain(self, name: str, weight: float = 1.0) -> Lora:
        """Read a LoRA that is attached beside others. Raises UserError unless it is a plain one that fits."""
        lora = read_lora(name, weight, self.architecture, self.networks, fused=False)
        assert isinstance(lora, Lora)
        return lora


def _of(weights: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, weights[name]) for name in names)
