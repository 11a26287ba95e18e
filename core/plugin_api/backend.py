"""The contract of a data backend: where samples and caches live.

There are two kinds. A :class:`DataBackend` keeps files under keys (a folder, a bucket): an image is a file, and its
caption stands in a file beside it. A :class:`SampleBackend` keeps samples (rows of a table, members of an archive),
each with its captions. Keys are names of samples: they do not depend on where the data lives, so that the same images
give the same batches from every source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from pydantic import BaseModel, ConfigDict

from ..errors import UserError


@dataclass(frozen=True)
class Entry:
    """One stored object.

    Attributes:
        key: POSIX path relative to the backend's root; the same wherever the data lives.
        size: Size in bytes.
        version: A text that changes when the content does (modification time, ETag).
        problem: Why the object cannot be read, where the listing shows it (a named pipe, a broken link). A key that
            ends in a slash stands for a folder that cannot be listed.
    """

    key: str
    size: int
    version: str
    problem: str = ""


class DataBackend(ABC):
    """Lists, opens, tests and writes keys under one root.

    A missing object raises FileNotFoundError, one that may not be read PermissionError: the image is quarantined and
    the run goes on. A server that does not answer after its retries raises :class:`distill.core.errors.OutOfReach`, and
    the run ends in a state from which it can resume.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    key_aliases: ClassVar[Mapping[str, str]] = {}
    """Names that other tools give this backend's keys -> the key."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> name to pip install, for packages that only this backend needs."""
    on_this_machine: ClassVar[bool] = False
    """Whether caches and checkpoints can be used in place, rather than through a local copy."""
    place_keys: ClassVar[tuple[str, str]] = ("instance_data_dir", "prompts_file")
    """The keys that name the folder and, for prompts, the one file; used in messages."""

    class Config(BaseModel):
        """The keys that this backend adds to a dataset entry."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def example(cls, folder: Path, files: Mapping[str, bytes]) -> Mapping[str, Any] | None:
        """Store `files` in a place of this kind, for the conformance suite (:mod:`.testing`).

        Args:
            folder: An empty folder that may be written to.
            files: Contents by key: images, and their captions in .txt files (``a/001.png``, ``a/001.txt``).

        Returns:
            The keys of a dataset entry that names the place; None where none can be made on this machine.
        """
        return None

    def check(self) -> None:
        """Check the keys of the dataset entry without using the network; called before anything loads.

        Raises:
            distill.core.errors.BadValue: A key of the entry cannot be used. In a remedy, ``data.<id>.`` is replaced by
                the entry's own id.
        """
        return

    @property
    @abstractmethod
    def location(self) -> str:
        """The root, as messages name it."""

    @abstractmethod
    def list(self) -> Iterator[Entry]:
        """Yield every object under the root, recursively, in sorted key order."""

    @property
    def parallel_reads(self) -> int:
        """Number of simultaneous reads that pay off because they wait for another machine; 0 means few."""
        return 0

    @property
    def account(self) -> str:
        """Whose credentials are used, in words and without secrets, for `distill doctor`; empty where none are."""
        return ""

    @property
    def prompts_key(self) -> str | None:
        """For ``dataset_type: prompts``, the one object that holds them; None for the .txt files under the root."""
        return None

    def entry(self, key: str) -> Entry:
        """Return the entry that :meth:`list` yields for one object. Raises FileNotFoundError."""
        found = next((entry for entry in self.list() if entry.key == key), None)
        if found is None:
            raise FileNotFoundError(key)
        return found

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """Return a binary stream of the object's content. Raises FileNotFoundError."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return True if the object exists."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write the object completely or not at all."""

    def upload(self, key: str, path: Path) -> None:
        """Write a local file as an object, completely or not at all."""
        self.write(key, path.read_bytes())

    def delete(self, key: str) -> None:
        """Remove an object; it is no error if it is gone already."""
        raise UserError(f"from {self.location} nothing can be removed", "remove what is too much by hand")


@dataclass(frozen=True)
class SampleChunk:
    """A chunk of samples as columns of equal length.

    Attributes:
        keys: Names of the samples, as ``cats/001.jpg``: the same wherever they live. Each name comes once.
        positions: The key with which :meth:`SampleBackend.open` finds each image's bytes.
        sizes: Sizes of the images in bytes, 0 where unknown.
        versions: Texts that change when the image does (a hash of its bytes, best).
        captions: Each sample's texts as they are stored, before the dataset's rules for captions.
        widths: Upright width in pixels, 0 where only the image itself can give it.
        heights: Upright height in pixels, 0 where only the image itself can give it.
        problems: Why a sample cannot be used, empty where it can.
        resume: A token with which :meth:`SampleBackend.samples_after` continues after this chunk; empty where it
            cannot.
    """

    keys: Sequence[str]
    positions: Sequence[str]
    sizes: Sequence[int]
    versions: Sequence[str]
    captions: Sequence[Sequence[str]]
    widths: Sequence[int]
    heights: Sequence[int]
    problems: Sequence[str]
    resume: str = ""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class SequentialChunk:
    """Some images of a source that is read in its stored order, as columns of equal length.

    Attributes:
        positions: Positions of the images in the source, ascending.
        images: Functions that open each image's bytes. They raise FileNotFoundError or PermissionError.
        end: The position before which everything has been read.
        resume: A token with which :meth:`SampleBackend.sequential` continues after this chunk.
    """

    positions: Sequence[int]
    images: Sequence[Callable[[], BinaryIO]]
    end: int
    resume: str


class SampleBackend(DataBackend):
    """Samples that are not files of their own: rows of a table, members of an archive. Read-only."""

    @property
    def in_order(self) -> bool:
        """True if images are read in their stored order by :meth:`sequential`, and not by :meth:`open`.

        The positions of such samples are whole numbers, written in decimals, that grow in that order.
        """
        return False

    def sequential(self, resume: str = "") -> Generator[SequentialChunk, None, None]:
        """Yield all images in stored order, or those after the chunk with the token `resume`; only for `in_order`."""
        raise NotImplementedError(f"{self.name} is in_order and has no `sequential`")

    def check_samples(self, *, images: bool, captions: bool) -> None:
        """Check, without using the network, that the source has images and captions where they are asked for.

        Raises:
            distill.core.errors.BadValue: It lacks them.
        """
        return

    @abstractmethod
    def identity(self) -> str:
        """Return a text that changes whenever the samples may have; it must be cheap, since every start calls it."""

    @abstractmethod
    def samples(self, *, images: bool = True) -> Iterator[SampleChunk]:
        """Yield all samples, in any order, some thousand at a time.

        Args:
            images: Whether images are wanted; if not, captions are enough, and a source may hold nothing else.

        Raises:
            distill.core.errors.BadValue: The source cannot be read as it is: a missing column, a broken file.
        """

    def samples_after(self, resume: str) -> Iterator[SampleChunk]:
        """Continue an interrupted :meth:`samples`, with images, after the chunk with the token `resume`.

        Called only with tokens of earlier chunks, while :meth:`identity` is unchanged.
        """
        raise NotImplementedError(f"{self.name} marks chunks with `resume` and has no `samples_after`")

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """Return a binary stream of the image at position `key`. Raises FileNotFoundError."""

    def list(self) -> Iterator[Entry]:
        """Yield every sample with its size and version, in the order of :meth:`samples`."""
        for chunk in self.samples():
            yield from map(Entry, chunk.keys, chunk.sizes, chunk.versions)

    def exists(self, key: str) -> bool:
        """Return True if there is a sample of this name."""
        return any(entry.key == key for entry in self.list())

    def write(self, key: str, data: bytes) -> None:
        """Raise UserError: such a source is read-only."""
        raise UserError(
            f"{self.location} is only read", "keep caches in a folder or a bucket: cache_dir_vae, cache_dir"
        )
