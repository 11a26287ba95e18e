"""Mirrors of caches in a remote place: a local copy that is filled from there, and new shards pushed there.

The local copy is the cache that is used; every rule of its format holds for both. In the remote place, too, a shard
exists when a manifest names it, and a manifest is pushed after its shards: whenever a process dies, the remote place
holds whole shards. Any backend that can be written to will do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BadValue, UserError
from ...plugin_api.backend import DataBackend
from ...utils.files import write_whole
from ...utils.threads import threads
from .manifests import DESCRIPTOR, Shard, whole_lines, whole_text

if TYPE_CHECKING:
    from ...utils.progress import TaskProgress

MAX_PENDING_PUSHES = 4
"""Shards that may wait to be pushed while more are made."""
FETCHES = 8


class RemoteCache:
    """A remote place for caches, as an entry of the data file names it.

    Args:
        entry: The entry's id.
        backend: Reads and writes it.
        prefix: In front of all its keys: a folder with its slash, or nothing.
        listing: Key -> bytes of all objects, shared by all folders of one entry so that it is requested once.
    """

    def __init__(
        self, entry: str, backend: DataBackend, prefix: str = "", listing: dict[str, int] | None = None
    ) -> None:
        self.entry, self.backend, self.prefix = entry, backend, prefix
        self._listing: dict[str, int] = {} if listing is None else listing
        self._listed = listing is not None

    def within(self, folder: str) -> RemoteCache:
        """Return a folder of this place."""
        return RemoteCache(self.entry, self.backend, f"{self.prefix}{folder}/", self.sizes())

    def sizes(self) -> dict[str, int]:
        """Return key -> bytes of every object there. Raises UserError where the place cannot be listed."""
        if not self._listed:
            try:
                self._listing |= {entry.key: entry.size for entry in self.backend.list()}
            except BadValue as error:
                raise UserError(f"data.{self.entry}.{error}", error.remedy) from error
            self._listed = True
        return self._listing

    def read(self, key: str) -> bytes:
        """Read an object. Raises FileNotFoundError or PermissionError."""
        with self.backend.open(self.prefix + key) as stream:
            return stream.read()

    def write(self, key: str, data: bytes | Path) -> None:
        """Write an object from bytes or from a file. Raises UserError where it may not be written."""
        try:
            if isinstance(data, Path):
                self.backend.upload(self.prefix + key, data)
            else:
                self.backend.write(self.prefix + key, data)
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(
                f"data.{self.entry}: {self.backend.location} cannot be written: {error.strerror or error}",
                "give an account that may write there, or another place",
            ) from error


class Mirror:
    """The local folder of one cache and its remote copy.

    Args:
        remote: The remote copy, with the cache's own folder in its prefix.
        folder: The local folder.
        progress: Reports every shard that is fetched.
    """

    def __init__(self, remote: RemoteCache, folder: Path, *, progress: TaskProgress) -> None:
        self.remote, self.folder, self._progress = remote, folder, progress
        self._remote_sizes: dict[str, int] = {}
        self._pushes: deque[Future[None]] = deque()
        self._pusher: ThreadPoolExecutor | None = None
        self._failed = False

    # -- download ----------------------------------------------------------------------------------------------------

    def pull(self) -> None:
        """Download the manifests, then the shards that they name and that are not here."""
        prefix = self.remote.prefix
        self._remote_sizes = {
            key.removeprefix(prefix): size for key, size in self.remote.sizes().items() if key.startswith(prefix)
        }
        manifests = [name for name in self._remote_sizes if name.endswith(".jsonl") or name == DESCRIPTOR]
        longer = [name for name in manifests if _size(self.folder / name) < self._remote_sizes[name]]
        with threads(FETCHES) as pool:
            for name, data in zip(longer, pool.map(self.remote.read, longer), strict=True):
                write_whole(self.folder / name, data)
        missing = [shard for shard in named_shards(self.folder) if _size(self.folder / shard.file) != shard.size]
        missing = [shard for shard in missing if self._remote_sizes.get(shard.file) == shard.size]
        if not missing:
            return
        what = f"fetching caches from {self.remote.backend.location}"
        with self._progress(what, len(missing)) as advance, threads(FETCHES) as pool:
            for _ in pool.map(self.fetch, missing):
                advance(1)

    def fetch(self, shard: Shard) -> bool:
        """Download one shard; return whether it was there and had the right checksum."""
        if self._remote_sizes.get(shard.file) != shard.size:
            return False
        try:
            data = self.remote.read(shard.file)
        except (FileNotFoundError, PermissionError):
            return False
        if sha256(data).hexdigest() != shard.sha256:
            return False
        path = self.folder / shard.file
        write_whole(path, data)
        os.utime(path, ns=(shard.mtime_ns, shard.mtime_ns))  # as written: it need not be hashed again
        return True

    # -- upload ------------------------------------------------------------------------------------------------------

    def push_missing(self) -> None:
        """Push the shards that an earlier process made and could not push."""
        for path in sorted(self.folder.glob("*.jsonl")):
            shards = [line["shard"] for line in whole_lines(path) if "shard" in line]
            files = [shard["file"] for shard in shards if self._remote_sizes.get(shard["file"]) != shard["size"]]
            unpushed = [file for file in files if (self.folder / file).exists()]
            if unpushed or self._remote_sizes.get(path.name) != len(self._manifest(path)):
                self._submit(unpushed, path.name)
        self.flush()

    def push(self, manifest: str, shard: str | None) -> None:
        """Push a shard, then the manifest that names it, in the background. Raises the error of an earlier push."""
        while len(self._pushes) >= MAX_PENDING_PUSHES:
            self._pushes.popleft().result()
        self._submit([shard] if shard else [], manifest)

    def flush(self) -> None:
        """Wait until everything is pushed. Raises OutOfReach or UserError when it cannot be."""
        while self._pushes:
            self._pushes.popleft().result()
        if self._pusher is not None:
            self._pusher.shutdown()
            self._pusher = None

    def _submit(self, shards: Iterable[str], manifest: str) -> None:
        self._pusher = self._pusher or ThreadPoolExecutor(1)
        self._pushes.append(self._pusher.submit(self._push, list(shards), manifest))

    def _push(self, shards: Iterable[str], manifest: str) -> None:
        if self._failed:
            return  # the first failure is raised where it is waited for; the rest is pushed by the next start
        self._failed = True
        if DESCRIPTOR not in self._remote_sizes:
            self.remote.write(DESCRIPTOR, (self.folder / DESCRIPTOR).read_bytes())
            self._remote_sizes[DESCRIPTOR] = 0
        for file in shards:
            self.remote.write(file, self.folder / file)
            self._remote_sizes[file] = (self.folder / file).stat().st_size
        text = self._manifest(self.folder / manifest)
        self.remote.write(manifest, text)
        self._remote_sizes[manifest] = len(text)
        self._failed = False

    def _manifest(self, path: Path) -> bytes:
        """Return a manifest that names only the shards that have been pushed."""
        lines = [
            line for line in whole_lines(path) if "shard" not in line or line["shard"]["file"] in self._remote_sizes
        ]
        return whole_text(lines)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def named_shards(folder: Path) -> list[Shard]:
    """List the shards that a folder's manifests name, except for dropped ones."""
    lines: list[Mapping[str, Any]] = [line for path in sorted(folder.glob("*.jsonl")) for line in whole_lines(path)]
    dropped = {line["drop"] for line in lines if "drop" in line}
    shards = {line["shard"]["file"]: Shard(**line["shard"]) for line in lines if "shard" in line}
    return [shard for file, shard in shards.items() if file not in dropped]
