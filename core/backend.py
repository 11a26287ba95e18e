"""The contract of a data backend: where samples and caches live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Entry:
    """One stored object.

    Attributes:
        key: POSIX path relative to the backend's root; the same wherever the data lives.
        size: Bytes.
        version: Changes when the content does (modification time, ETag).
    """

    key: str
    size: int
    version: str


class DataBackend(ABC):
    """List, open, test and write keys under one root."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()

    class Config(BaseModel):
        """The keys that this backend adds to a dataset entry."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def location(self) -> str:
        """The root, for messages."""

    @abstractmethod
    def list(self) -> Iterator[Entry]:
        """Every object under the root, recursively, in sorted key order."""

    @property
    def prompts_key(self) -> str | None:
        """For ``dataset_type: prompts``: the one object that holds them; None for the .txt files under the root."""
        return None

    def entry(self, key: str) -> Entry:
        """What :meth:`list` says of one object. Raises FileNotFoundError."""
        found = next((entry for entry in self.list() if entry.key == key), None)
        if found is None:
            raise FileNotFoundError(key)
        return found

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A binary stream of the object's content. Raises FileNotFoundError."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether the object is there."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write the object whole or not at all."""
