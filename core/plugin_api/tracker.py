"""The contract of a tracker: where a run's figures and images are watched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of the run it starts for."""

    output_dir: Path
    project: str
    name: str
    config: Mapping[str, Any]
    """The resolved configuration without secrets, JSON-able."""
    hparams: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    resumed_step: int = 0


class Tracker(ABC):
    """Writes scalars, images and text. Imports its library only when started. Steps count optimizer steps."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> what to pip install, for each package that it needs."""

    class Config(BaseModel):
        """The tracker's own settings, under ``tracker_config.<name>``."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Open the run; a resumed run continues what is there."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Scalars of a step, by slash-separated name."""

    def images(self, name: str, images: Mapping[str, Image], step: int) -> None:  # noqa: B027
        """Images by caption."""

    def text(self, name: str, text: str, step: int) -> None:  # noqa: B027
        """Markdown text."""

    def notices(self) -> list[str]:
        """Lines to say once it has started (that it writes offline, and how to send that later)."""
        return []

    def finish(self, scores: Mapping[str, float] | None = None) -> None:  # noqa: B027
        """Close; `scores` are the run's final evaluation figures."""
