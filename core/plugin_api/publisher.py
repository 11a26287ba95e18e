"""The contract of a publisher: where a finished student goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from ..settings.run_settings import RunSettings
    from .family import ModelFamily


@dataclass(frozen=True)
class PublishSetting:
    """The facts of the run that a publisher may use.

    Attributes:
        run_name: Name of the run, or of its output folder.
        model_type: The kind of student that was trained.
        family: Class of the student's family.
        load_family: Makes the family; no weights load.
    """

    run_name: str = "student"
    model_type: Literal["lora", "full"] = "lora"
    family: type[ModelFamily] | None = None
    load_family: Callable[[], ModelFamily] | None = None


class Publisher(ABC):
    """Uploads or copies a finished ``student/`` folder. A failure is a warning, never the end of a run."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}

    class Config(BaseModel):
        """The publisher's own settings."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any, setting: PublishSetting | None = None) -> None:
        self.config = config
        self.setting = setting or PublishSetting()

    @classmethod
    def from_run(cls, run: RunSettings, config: Any | None) -> Any | None:
        """Return its settings if the run asks for it, otherwise None. By default its name must be in ``publish_to``.

        Args:
            run: The keys of the run.
            config: Its part of ``publisher_config``, validated, where there is one.
        """
        asked = {cls.name, *cls.aliases} & set(run.publish_to)
        return (config or cls.Config()) if asked else None

    @abstractmethod
    def problems(self) -> list[str]:
        """Return reasons why it cannot work (no token, a placeholder id); called at the start of the run."""

    @abstractmethod
    def publish(self, student: Path) -> str:
        """Publish the folder; return where it went."""
