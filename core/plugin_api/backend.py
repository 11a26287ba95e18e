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
        size: Bytes.
        version: Changes when the content does (modification time, ETag).
        problem: Why it cannot be read, where the listing tells (a named pipe, a link to nothing); a key with a slash at
            its end stands for a folder that cannot be listed.
    """

    key: str
    size: int
    version: str
    problem: str = ""


class DataBackend(ABC):
    """List, open, test and write keys under one root.

    What is not there raises FileNotFoundError, what may not be read PermissionError: the image is set aside and the
    run goes on. A place that does not answer after its retries raises :class:`distill.core.errors.OutOfReach`, and the
    run ends resumable.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    key_aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of its keys, from other tools -> the key."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> what to pip install, for packages that only this backend needs."""
    on_this_machine: ClassVar[bool] = False
    """Whether caches and checkpoints can be used where they lie, rather than through a copy on this machine."""
    place_keys: ClassVar[tuple[str, str]] = ("instance_data_dir", "prompts_file")
    """The keys that name the folder and, for prompts, the one file: for messages."""

    class Config(BaseModel):
        """The keys that this backend adds to a dataset entry."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def example(cls, folder: Path, files: Mapping[str, bytes]) -> Mapping[str, Any] | None:
        """Put `files` into a place of this kind, for the conformance suite (:mod:`.testing`).

        Args:
            folder: Empty; whatever is needed may be written into it.
            files: Images, and their captions in .txt files, by key (``a/001.png``, ``a/001.txt``).

        Returns:
            The keys of an entry that names the place; None where such a place cannot be made on this machine.
        """
        return None

    def check(self) -> None:
        """Look whether the place can be there, without the network: called before anything loads.

        Raises:
            distill.core.errors.BadValue: A key of the entry cannot be used. A remedy may say ``data.<id>.``: the
                entry's own id is put there.
        """
        return

    @property
    @abstractmethod
    def location(self) -> str:
        """The root, for messages."""

    @abstractmethod
    def list(self) -> Iterator[Entry]:
        """Every object under the root, recursively, in sorted key order."""

    @property
    def parallel_reads(self) -> int:
        """Reads at the same time that are worth their threads, because they wait for another machine; 0: few."""
        return 0

    @property
    def account(self) -> str:
        """Whose credentials are used, in words and without them, for `distill doctor`; empty where none are needed."""
        return ""

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

    def upload(self, key: str, path: Path) -> None:
        """Write a file of this machine as an object, whole or not at all."""
        self.write(key, path.read_bytes())

    def delete(self, key: str) -> None:
        """Remove an object, which may be gone already."""
        raise UserError(f"from {self.location} nothing can be removed", "remove what is too much by hand")


@dataclass(frozen=True)
class SampleChunk:
    """Some samples, in columns of one length.

    Attributes:
        keys: Names of the samples, as ``cats/001.jpg``: the same wherever they live. Each name comes once.
        positions: What :meth:`SampleBackend.open` finds each image's bytes by.
        sizes: Bytes of the images, 0 where that is not known.
        versions: Change when the image does (a hash of its bytes, best).
        captions: Each sample's texts as they stand there, before the dataset's rules for captions.
        widths: Upright width in pixels, 0 where the image itself must be asked.
        heights: Upright height in pixels, 0 where the image itself must be asked.
        problems: Why a sample cannot be used, empty where it can.
        resume: What :meth:`SampleBackend.samples_after` goes on behind this chunk by; empty where it cannot.
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
    """Some images of a source that is read in its order, in columns of one length.

    Attributes:
        positions: Where they lie, growing.
        images: Opens each one's bytes. Raises FileNotFoundError or PermissionError.
        end: Everything that lies before this place has passed by.
        resume: What :meth:`SampleBackend.passing` goes on behind this passage by.
    """

    positions: Sequence[int]
    images: Sequence[Callable[[], BinaryIO]]
    end: int
    resume: str


class SampleBackend(DataBackend):
    """Samples that are not files of their own: rows of a table, members of an archive. Read only."""

    @property
    def in_order(self) -> bool:
        """Whether images are read in the order that they lie in, by :meth:`passing`, and not by :meth:`open`.

        The positions of such samples are whole numbers, written in decimals, that grow in that order.
        """
        return False

    def sequential(self, resume: str = "") -> Generator[SequentialChunk, None, None]:
        """All images in their order, or those behind the passage that carried `resume`; only for `in_order`."""
        raise NotImplementedError(f"{self.name} is in_order and has no `passing`")

    def check_samples(self, *, images: bool, captions: bool) -> None:
        """Look whether the source has images and captions where they are asked for, without the network.

        Raises:
            distill.core.errors.BadValue: It has not.
        """
        return

    @abstractmethod
    def identity(self) -> str:
        """A text that changes whenever the samples may have; cheap, for it is asked for at every start."""

    @abstractmethod
    def samples(self, *, images: bool = True) -> Iterator[SampleChunk]:
        """All samples, in any order, some thousand at a time.

        Args:
            images: Whether images are wanted; without, captions are enough, and a source may hold nothing else.

        Raises:
            distill.core.errors.BadValue: The source cannot be read as it is: a missing column, a broken file.
        """

    def samples_after(self, resume: str) -> Iterator[SampleChunk]:
        """The rest of :meth:`samples`, with images, behind the chunk that carried `resume`: a listing that was
        broken off goes on. Called only with what chunks carried, while :meth:`identity` is what it was.
        """
        raise NotImplementedError(f"{self.name} marks chunks with `resume` and has no `samples_after`")

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A binary stream of one image's bytes, by its place. Raises FileNotFoundError."""

    def list(self) -> Iterator[Entry]:
        """Every sample with its size and version, in the order of :meth:`samples`."""
        for chunk in self.samples():
            yield from map(Entry, chunk.keys, chunk.sizes, chunk.versions)

    def exists(self, key: str) -> bool:
        """Whether there is a sample of this name."""
        return any(entry.key == key for entry in self.list())

    def write(self, key: str, data: bytes) -> None:
        """Refused: such a source is only read."""
        raise UserError(
            f"{self.location} is only read", "keep caches in a folder or a bucket: cache_dir_vae, cache_dir"
        )
