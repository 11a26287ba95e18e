"""The contract of a publisher: where a finished student goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from .config import RunSettings


class Publisher(ABC):
    """Takes a finished ``student/`` folder somewhere. A failure is a warning, never the end of a run."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}

    class Config(BaseModel):
        """The publisher's own settings."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def from_run(cls, run: RunSettings, config: Any | None) -> Any | None:
        """Its settings when the run asks for it, else None. By default: its name stands in ``publish_to``.

        Args:
            run: The keys of the run.
            config: Its part of ``publisher_config``, validated, where there is one.
        """
        return (config or cls.Config()) if cls.name in run.publish_to else None

    @abstractmethod
    def problems(self) -> list[str]:
        """What would keep it from working, checked at the start of the run (no token, a placeholder id)."""

    @abstractmethod
    def publish(self, student: Path) -> str:
        """Publish the folder; returns where it went."""
