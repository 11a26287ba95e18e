"""Settings that a paper or its authors' code trains a method with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class Recommended:
    """What one source trains with. Rates are for AdamW.

    Attributes:
        source: Where the settings were read: a paper by its number, or a file of a repository.
        run: Keys of the run and their values, as ``{"learning_rate": 5e-5, "lora_alpha": 8}``. A ``lora_alpha`` is that
            of ``lora_rank`` beside it (64 where it is not named): at another rank the same ratio is used.
        method: Settings of the method and their values.
        batch: Samples of one optimizer step over all processes. It is told beside the run's, but not set: what fits a
            machine is not the paper's to say.
        told: Further settings that are told but not set, since they ask for more data or memory, as
            ``{"gan_weight": 5e-3}``.
        model_type: The kind of student that it is for; None for either.
        families: Names of the families that it is for; empty for all.
    """

    source: str
    run: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    model_type: Literal["lora", "full"] | None = None
    families: tuple[str, ...] = ()

    def fits(self, *, model_type: str, family: str) -> bool:
        """Return True if it is for this kind of student on this family."""
        return self.model_type in (None, model_type) and (not self.families or family in self.families)


def read_recommended(module: str, method: str) -> tuple[Recommended, ...]:
    """Return what ``assets/recommended.yaml`` beside a module has for a method.

    The file is an object of methods, each a list of rows of these fields; a row that names no family or no kind of
    student is for all.

    Args:
        module: The module's ``__file__``.
        method: Name of the method.
    """
    rows = _content(Path(module).with_name("assets") / "recommended.yaml").get(method, ())
    return tuple(Recommended(**{**row, "families": tuple(row.get("families", ()))}) for row in rows)


@cache
def _content(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))
