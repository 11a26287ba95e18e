"""A model in a repository of the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .empty import by_name_of
from .hub import cached_file, hub_answers, hub_errors, hub_file, hub_folder, hub_header, hub_names
from .source import SETTINGS, FolderSource, safetensors_among
from .weights import WeightFile

if TYPE_CHECKING:
    from torch import Tensor

OTHER_VARIANTS = ("*.fp16[.-]*", "*.bf16[.-]*", "*.non_ema[.-]*", "*openvino*")
"""Weights that are left out where no variant is asked for, and the component has weights of none."""

logger = logging.getLogger(__name__)


@dataclass
class HubSource(FolderSource):
    """A repository of the Hugging Face hub, downloaded component by component when needed."""

    revision: str | None = None

    def component(self, part: str) -> Path:
        weights = f"*.{self.variant}*.safetensors" if self.variant else "*.safetensors"
        patterns = [*(f"{part}/{pattern}" for pattern in SETTINGS), f"{part}/{weights}"]
        with hub_errors(self.name, "download"):
            root = hub_folder(
                self.name, revision=self.revision, allow_patterns=patterns, ignore_patterns=self._left_out(part)
            )
        return root / part

    def _left_out(self, part: str) -> list[str] | None:
        """Return the patterns of a component's weights that are not read; None where all may be, as where the
        repository has a variant alone (Kolors).
        """
        if self.variant:
            return None
        if hub_answers() and not safetensors_among(without_variants(self._names_of(part))):
            return None
        return [*OTHER_VARIANTS]

    def _names_of(self, part: str) -> list[str]:
        """Return the names of the files in a component's folder, those of folders in it with their path."""
        folder = self.folder(part)
        return [name.removeprefix(folder) for name in self._names if name.startswith(folder)]

    def names_there(self, part: str) -> list[str]:
        there = [name for name in self._names_of(part) if "/" not in name]
        return without_variants(there) if self._left_out(part) else there

    def variant_to_load(self) -> str | None:
        return super().variant_to_load() if hub_answers() else self.variant

    def file(self, relative: str) -> Path:
        with hub_errors(self.name, relative):
            return hub_file(self.name, relative, revision=self.revision)

    def check(self, *, without: Collection[str] = ()) -> None:
        self.check_configs()

    def check_weights(self, parts: Sequence[str]) -> None:
        """Compare what the headers of the files say, which are read without the weights, with the configs."""
        if not hub_answers():
            logger.info(
                "model %s is on the hub, which is not asked: each part is compared with its config as it loads",
                self.name,
            )
            return
        for part in parts:
            if self.has(part):
                self.compare_part(part, self._shapes_of_headers)

    def _shapes_of_headers(self, part: str, network: Any) -> Mapping[str, Tensor]:
        names = self.weights_names(part, self.names_there(part))
        files = [self._header(self.folder(part) + name) for name in names]
        return by_name_of(network, {name: file.shape(name) for file in files for name in file.names})

    def folder(self, part: str) -> str:
        """Return the path of a component in the repository, with its slash."""
        return f"{part}/"

    @cached_property
    def _names(self) -> list[str]:
        with hub_errors(self.name, "list of files"):
            return hub_names(self.name, revision=self.revision)

    def _header(self, name: str) -> WeightFile:
        cached = cached_file(self.name, name, revision=self.revision)
        if cached is not None:
            return WeightFile.open(cached)
        with hub_errors(self.name, f"header of {name}"):
            entries, metadata = hub_header(self.name, name, revision=self.revision)
        return WeightFile(Path(self.name) / name, entries, metadata)

    def digest(self, part: str) -> str:
        commit = self.file("model_index.json").parent.name
        return hashlib.sha256(f"{self.name}@{commit}:{self.variant}:{part}".encode()).hexdigest()


def without_variants(names: Sequence[str]) -> list[str]:
    """Return the names of files that are of no variant."""
    return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in OTHER_VARIANTS)]
