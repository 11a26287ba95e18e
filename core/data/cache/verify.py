"""Comparison of caches with the entries that a configuration's datasets need: damaged, missing and orphaned ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..dataset import Dataset
from ..hashing import Lookup, UInt64s
from .cache_builder import latent_descriptor, text_descriptor
from .cache_paths import CachePaths
from .encode import flips
from .tensor_cache import TensorCache, cache_folders, descriptor_hash, remove_cache

if TYPE_CHECKING:
    from ...plugin_api.family import ModelFamily

LOOKED_AT = ("latents", "text")
"""Kinds of caches whose needed entries are known; of others only checksums are compared."""


@dataclass(frozen=True)
class Need:
    """A cache that datasets need, with the keys of the entries that they need of it, shape (n, 2)."""

    name: str
    parent: Path
    descriptor: dict[str, Any]
    keys: UInt64s

    @property
    def folder(self) -> Path:
        """The cache's own folder."""
        return self.parent / descriptor_hash(self.descriptor)


@dataclass
class CacheState:
    """The findings about one cache.

    Attributes:
        name: Its name for people.
        cache: The cache as it was read, without damaged shards.
        damaged: Names of shards whose checksum was wrong.
        needed: Different entries that datasets need.
        missing: Needed entries that are not there.
        failed: Missing entries that could not be encoded earlier and will not be tried again.
        orphaned: Entries that no dataset of the configuration needs, shape (entries,).
    """

    name: str
    cache: TensorCache
    damaged: list[str]
    needed: int = 0
    missing: int = 0
    failed: int = 0
    orphaned: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))

    @property
    def num_orphaned(self) -> int:
        """The number of orphaned entries."""
        return int(self.orphaned.sum())

    @property
    def orphaned_bytes(self) -> int:
        """The bytes of the orphaned entries, estimated from their number."""
        return round(self.cache.num_bytes * self.num_orphaned / max(1, len(self.cache)))

    def line(self) -> str:
        """Return the line to print."""
        parts = [f"{len(self.cache):,} entries ({mebibytes(self.cache.num_bytes)})"]
        if self.needed:
            known = f" ({self.failed:,} of them cannot be encoded)" if self.failed else ""
            parts.append(f"{self.needed:,} needed, {self.missing:,} missing{known}")
        if len(self.orphaned):
            parts.append(f"{self.num_orphaned:,} orphaned ({mebibytes(self.orphaned_bytes)})")
        parts.append(f"{len(self.damaged)} damaged files")
        return f"{self.name}, {self.cache.folder}: {', '.join(parts)}"

    def remove_orphaned(self) -> int:
        """Remove the orphaned entries, or the whole cache where nothing else is in it; return the bytes freed."""
        if not self.num_orphaned:
            return 0
        return remove_cache(self.cache.folder) if self.orphaned.all() else self.cache.retain(~self.orphaned)


def mebibytes(num_bytes: int) -> str:
    """Format a size for people."""
    return f"{num_bytes / 2**20:,.1f} MiB"


def needs(family: ModelFamily, paths: CachePaths, datasets: Sequence[Dataset], *, images: bool) -> list[Need]:
    """Return the latents that each dataset of images needs, and the text caches, which datasets may share.

    Args:
        family: Its fingerprints name the caches.
        paths: Paths of the caches.
        datasets: The datasets, with their indexes up to date.
        images: Whether latents are needed; if not, those that are there are compared all the same.
    """
    found = []
    for dataset in datasets:
        parent = paths.latents(dataset.settings)
        if dataset.settings.has_images and (images or any(cache_folders(parent))):
            keys = np.concatenate([dataset.entry_keys(dataset.rows, flip) for flip in flips(dataset)])
            found.append(Need(f"latents of {dataset.id!r}", parent, latent_descriptor(family, dataset.id), keys))
    groups: dict[Path, list[Dataset]] = {}
    for dataset in datasets:
        groups.setdefault(paths.texts(dataset.settings), []).append(dataset)
    for parent, group in groups.items():
        keys = np.concatenate([dataset.index.caption_digests for dataset in group])
        name = f"captions of {', '.join(repr(dataset.id) for dataset in group)}"
        found.append(Need(name, parent, text_descriptor(family), keys))
    return found


def cache_states(needed: Sequence[Need], parents: Sequence[Path]) -> Iterator[CacheState]:
    """Yield each cache that is needed, then each other one below `parents`; damaged shards are removed on the way."""
    for need in needed:
        yield _of_need(need, _opened(need.parent, need.descriptor, need.name))
    known = {need.folder for need in needed}
    for parent in parents:
        for folder, descriptor in cache_folders(parent):
            if folder not in known:
                yield _of_rest(*_opened(parent, descriptor, f"{descriptor['kind']} that nothing needs"))


def _opened(parent: Path, descriptor: dict[str, Any], name: str) -> tuple[TensorCache, list[str]]:
    cache = TensorCache(parent, descriptor, label=name)
    return cache, cache.load(thorough=True)


def _of_need(need: Need, opened: tuple[TensorCache, list[str]]) -> CacheState:
    cache, damaged = opened
    keys = np.unique(need.keys, axis=0)
    lacking = keys[cache.locate(keys) < 0]
    orphaned = Lookup(keys).find(cache.keys()) < 0
    return CacheState(
        need.name, cache, damaged, len(keys), len(lacking), int(cache.failed(lacking).sum()), orphaned
    )  # fmt: skip


def _of_rest(cache: TensorCache, damaged: list[str]) -> CacheState:
    """Describe a cache of other encoders or settings, or of a dataset that is gone."""
    kind = cache.descriptor["kind"]
    if kind not in LOOKED_AT:
        return CacheState(f"{kind}", cache, damaged)
    whose = f" of {cache.descriptor['dataset']!r}" if "dataset" in cache.descriptor else ""
    return CacheState(f"{kind}{whose}, not needed", cache, damaged, orphaned=np.ones(len(cache), np.bool_))


def folders_beside(paths: CachePaths, parents: Sequence[Path]) -> list[Path]:
    """List the latent folders of datasets that the configuration no longer has, where all share one parent."""
    root = paths.latents_root
    found = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [path for path in found if path not in parents]
