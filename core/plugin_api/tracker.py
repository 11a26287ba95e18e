"""The contract of a tracker: where a run's metrics and images are shown."""

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
    """The facts of a run that a tracker starts with."""

    output_dir: Path
    project: str
    name: str
    config: Mapping[str, Any]
    """The resolved configuration without secrets, as JSON values."""
    hparams: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    resumed_step: int = 0


class Tracker(ABC):
    """Writes scalars, images and text. Imports its library only when started. Steps are optimizer steps."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> name to pip install, for each package that it needs."""

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
        """Log the scalars of a step, by slash-separated name."""

    def images(self, name: str, images: Mapping[str, Image], step: int) -> None:  # noqa: B027
        """Log images by caption."""

    def text(self, name: str, text: str, step: int) -> None:  # noqa: B027
        """Log Markdown text."""

    def notices(self) -> list[str]:
        """Return lines to print once it has started (that it writes offline, and how to send that later)."""
        return []

    def finish(self, scores: Mapping[str, float] | None = None) -> None:  # noqa: B027
        """Close the run; `scores` are its final evaluation scores."""
