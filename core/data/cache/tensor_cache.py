# pyright: reportAttributeAccessIssue=false
"""A cache of tensors: safetensors shards on disk, memory-mapped for reading, whole or absent, checked.

A cache is a folder named by the hash of its *descriptor* (what all entries depend on: the encoder's fingerprint, the
format). Entries have 128-bit keys made of everything else that they depend on. A shard holds entries of one shape:

    <descriptor hash>/descriptor.json      what all entries depend on
                     <writer>.jsonl        one line for each shard of one writer: file, count, size, sha256, mtime
                     <writer>-00000.safetensors

Every writer (process, rank, session) has files of its own, so that writers need no lock. A shard exists when a line
names it, and the line is written after the shard is safely on disk: a killed build leaves whole shards only.

Checks: at start a shard whose size or time differs from its line is hashed; when an entry is first read in a process
its own CRC-32 is compared, and that none of its values is NaN or infinity. What fails is dropped, and encoded anew by
the next build.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b, sha256
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import DistillError
from ...utils.files import PARTIAL, append_line, is_stale, sync_folder, write_whole
from ...utils.finite import finite_rows
from ..hashing import LOOKUP_ROWS, Int64s, Lookup, UInt64s
from ..mapped import MappedShard
from .manifests import DESCRIPTOR, Failure, Shard, whole_lines
from .mirror import Mirror

logger = logging.getLogger(__name__)
KEYS, CRCS = "cache.keys", "cache.crc32"
OPEN_SHARDS = 1024
TOUCHED_BYTES = 64 * 2**20
"""Bytes of mapped files that stay in memory."""
FAULT_BYTES = 2**16
"""Least number of bytes that a read loads: the system maps the pages around as well."""
SHARDS_PER_MANIFEST = 64
"""Limit for a mirrored cache, whose manifest is pushed whole after each of its shards."""
ROW_BITS = 32


def descriptor_hash(descriptor: Mapping[str, Any]) -> str:
    """Return the short name of a cache's folder."""
    return blake2b(json.dumps(descriptor, sort_keys=True).encode(), digest_size=8).hexdigest()


def row_checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the CRC-32 of each entry over its tensors in the order of their names, shape (n,), int64."""
    count = len(next(iter(tensors.values())))
    return torch.tensor([row_checksum(tensors, row) for row in range(count)], dtype=torch.int64)


def row_checksum(tensors: Mapping[str, Tensor], row: int) -> int:
    """Return the CRC-32 of one entry."""
    crc = 0
    for name in sorted(tensors):
        flat = tensors[name][row].contiguous().reshape(-1).view(torch.uint8)
        crc = zlib.crc32(flat.numpy().data, crc)
    return crc


class TensorCache:
    """One folder of shards.

    Args:
        parent: Folder that holds the cache's folder (``cache_dir``).
        descriptor: Everything that all entries depend on.
        label: Its name in messages.
    """

    def __init__(self, parent: Path, descriptor: Mapping[str, Any], *, label: str) -> None:
        self.parent, self.descriptor, self.label = parent, dict(descriptor), label
        self.folder = parent / descriptor_hash(descriptor)
        self._shards: list[Shard] = []
        self._failures: dict[str, Failure] = {}
        self._seen: dict[str, set[int]] = {}
        self._lookup: Lookup | None = None
        self._starts: Int64s = np.zeros(1, np.int64)
        self._open: OrderedDict[int, MappedShard] = OrderedDict()
        self._touched = 0
        self._checked: dict[int, NDArray[np.bool_]] = {}
        self._lock = threading.Lock()
        self.mirror: Mirror | None = None
        self._writer: str | None = None
        self._num_written = 0

    # -- what is there ----------------------------------------------------------------------------------------------

    def load(self, *, thorough: bool = False) -> list[str]:
        """Read the manifests and check the shards; return the names of those dropped as damaged.

        Args:
            thorough: Hash every shard, not only those whose size or time differs from what was written.
        """
        records, self._failures = self._read_manifests()
        self._remove_leftovers({shard.file for shard in records})
        good, dropped = [], []
        for shard in records:
            why = self._damage(shard, thorough=thorough)
            if why is not None and self.mirror is not None and self.mirror.fetch(shard):
                why = self._damage(shard, thorough=thorough)
            if why is None:
                good.append(shard)
            else:
                dropped.append(shard.file)
                self._drop(shard.file, why)
        self._use(good)
        return dropped

    def _read_manifests(self) -> tuple[list[Shard], dict[str, Failure]]:
        shards: dict[str, Shard] = {}
        failures: dict[str, Failure] = {}
        dropped: set[str] = set()
        self._seen = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in whole_lines(path):
                failures.update((each["key"], Failure(**each)) for each in line.get("failures", ()))
                if "drop" in line:
                    dropped.add(line["drop"])
                elif "seen" in line:
                    self._seen.setdefault(line["seen"], set()).add(line["mtime_ns"])
                elif "shard" in line:
                    shard = Shard(**line["shard"])
                    shards[shard.file] = shard
        return [shard for name, shard in shards.items() if name not in dropped], failures

    def _remove_leftovers(self, known: set[str]) -> None:
        for pattern in (f"{PARTIAL}*", "*.safetensors"):
            for path in self.folder.glob(pattern):
                if path.name not in known and is_stale(path):
                    path.unlink(missing_ok=True)

    def _damage(self, shard: Shard, *, thorough: bool) -> str | None:
        path = self.folder / shard.file
        try:
            status = path.stat()
        except FileNotFoundError:
            return "it is gone"
        if status.st_size != shard.size:
            return f"it has {status.st_size} bytes instead of {shard.size}"
        known = status.st_mtime_ns in {shard.mtime_ns} | self._seen.get(shard.file, set())
        if known and not thorough:
            return None
        with path.open("rb") as stream:
            digest = sha256()
            while block := stream.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != shard.sha256:
            return "its checksum is wrong"
        if thorough and (bad := int((~self._finite(shard)).sum())):
            return f"{bad} of its {shard.count} entries hold NaN or infinity"
        if not known:  # copied: remembered, so that the next start need not hash it again
            self._record({"seen": shard.file, "mtime_ns": status.st_mtime_ns})
        return None

    def _finite(self, shard: Shard) -> Tensor:
        """Return which entries of a shard hold finite values alone, boolean, shape (n,)."""
        return finite_rows(MappedShard(self.folder / shard.file, shard.size).tensors)

    def _drop(self, file: str, why: str) -> None:
        logger.info(f"{self.label}: {file} is damaged ({why}) and is left out; its entries are encoded anew")
        self._record({"drop": file})
        (self.folder / file).unlink(missing_ok=True)

    def _use(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._open.clear()
        self._checked.clear()
        self._lookup = None
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_bytes(self) -> int:
        """The size of all shards in bytes."""
        return sum(shard.size for shard in self._shards)

    def locate(self, keys: UInt64s) -> Int64s:
        """Return the locations of entries for :meth:`read`, shape (n,); -1 for those that are not there.

        Args:
            keys: Shape (n, 2).
        """
        if not len(keys):
            return np.zeros(0, np.int64)
        if self._lookup is None:
            self._lookup = Lookup(self.keys())
        positions = self._lookup.find(keys)
        for start in range(0, len(positions), LOOKUP_ROWS):
            part = positions[start : start + LOOKUP_ROWS]
            shard = np.searchsorted(self._starts, part, side="right") - 1
            part[:] = np.where(part < 0, -1, (shard << ROW_BITS) | (part - self._starts[np.maximum(shard, 0)]))
        return positions

    def keys(self) -> UInt64s:
        """Return the keys of all entries, shape (n, 2)."""
        keys = np.empty((len(self), 2), np.uint64)
        for number, (start, end) in enumerate(pairwise(self._starts.tolist())):
            shard = self._shards[number]  # mapped for this alone: of most shards only a few entries are read later
            keys[start:end] = MappedShard(self.folder / shard.file, shard.size).tensors[KEYS].numpy().view(np.uint64)
        return keys

    def release_lookup(self) -> None:
        """Free the index that :meth:`locate` needs; it is made again on the next call."""
        self._lookup = None

    def failure(self, key: NDArray[np.uint64]) -> Failure | None:
        """Return why an entry could not be encoded earlier, or None."""
        return self._failures.get(key.tobytes().hex())

    def failed(self, keys: UInt64s) -> NDArray[np.bool_]:
        """Return a mask of the entries that could not be encoded earlier, shape (n,)."""
        if not self._failures or not len(keys):
            return np.zeros(len(keys), np.bool_)
        known = pa.array([bytes.fromhex(key) for key in self._failures], pa.binary(16))
        return pc.is_in(as_binary(keys), value_set=known).to_numpy(zero_copy_only=False)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _mapped(self, number: int) -> MappedShard:
        with self._lock:
            if number not in self._open:
                shard = self._shards[number]
                self._open[number] = MappedShard(self.folder / shard.file, shard.size)
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def _entry(self, location: int) -> dict[str, Tensor]:
        number, row = location >> ROW_BITS, location & ((1 << ROW_BITS) - 1)
        try:
            mapped = self._mapped(number).tensors
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(number, str(error)) from error
        tensors = {name: value for name, value in mapped.items() if name not in (KEYS, CRCS)}
        checked = self._checked.setdefault(number, np.zeros(self._shards[number].count, np.bool_))
        if not checked[row]:
            if row_checksum(tensors, row) != int(mapped[CRCS][row]):
                raise self._damaged(number, f"the checksum of entry {row} is wrong")
            if not finite_rows({name: value[row : row + 1] for name, value in tensors.items()}).all():
                raise self._damaged(number, f"entry {row} holds NaN or infinity", everywhere=True)
            checked[row] = True
        return {name: value[row] for name, value in tensors.items()}

    def _damaged(self, number: int, why: str, *, everywhere: bool = False) -> DistillError:
        """Remove a shard, and make the error; the remote copy, if there is one, is fetched unless it is bad as well."""
        file = self._shards[number].file
        if self.mirror is None or everywhere:
            self._drop(file, why)
        else:  # the next start fetches it again
            (self.folder / file).unlink(missing_ok=True)
        return DistillError(
            f"{self.label}: {self.folder / file} was damaged while the run was using it ({why}).\n"
            "  It has been removed; start the run again (resume_from_checkpoint=latest) and it is made anew."
        )

    def read(self, locations: Sequence[int] | Int64s) -> dict[str, Tensor]:
        """Read entries by location, stacked, each tensor of shape (B, ...). Raises DistillError for a damaged shard."""
        entries = [self._entry(int(location)) for location in locations]
        stacked = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
        self._release(sum(value.nbytes for value in stacked.values()) + FAULT_BYTES * len(entries))
        return stacked

    def _release(self, touched: int) -> None:
        with self._lock:
            self._touched += touched
            if self._touched > TOUCHED_BYTES:
                self._touched = 0
                for mapped in self._open.values():
                    mapped.release()

    # -- writing ----------------------------------------------------------------------------------------------------

    def _start_writing(self) -> str:
        """Return the prefix of this writer's file names; the folder is made on the first call."""
        full = self.mirror is not None and self._num_written >= SHARDS_PER_MANIFEST
        if self._writer is None or full:
            self._num_written = 0
            self._writer = uuid4().hex[:12]
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / DESCRIPTOR).exists():
                write_whole(self.folder / DESCRIPTOR, json.dumps(self.descriptor, indent=1).encode())
        return self._writer

    def _record(self, line: Mapping[str, Any], shard: str | None = None) -> None:
        writer = shard.rpartition("-")[0] if shard else self._start_writing()
        append_line(self.folder / f"{writer}.jsonl", json.dumps(line))
        if self.mirror is not None:
            self.mirror.push(f"{writer}.jsonl", shard)

    def write(self, keys: UInt64s, tensors: Mapping[str, Tensor], failures: Sequence[Failure] = ()) -> None:
        """Add one shard, whole or not at all, with the failures among its entries.

        Args:
            keys: Shape (n, 2); n may be 0 when all failed.
            tensors: By name, shape (n, ...) each.
            failures: Entries that were tried along with these and could not be encoded.
        """
        line: dict[str, Any] = {"failures": [asdict(failure) for failure in failures]} if failures else {}
        shard = self._write_shard(keys, tensors) if len(keys) else None
        if shard is not None:
            line["shard"] = asdict(shard)
        if line:
            self._record(line, shard.file if shard else None)

    def retain(self, kept: NDArray[np.bool_]) -> int:
        """Remove all entries but `kept`; shards that hold both kinds are rewritten. Returns the bytes freed.

        Args:
            kept: Shape (entries,).
        """
        before, shards = self.num_bytes, list(self._shards)
        for number, (start, end) in enumerate(pairwise(self._starts.tolist())):
            rows = torch.from_numpy(np.flatnonzero(kept[start:end]))
            if len(rows) == end - start:
                continue
            taken = {name: value[rows] for name, value in self._mapped(number).tensors.items()}
            keys = taken.pop(KEYS).numpy().view(np.uint64)
            del taken[CRCS]
            self.write(keys, taken)
            self._record({"drop": shards[number].file})
            (self.folder / shards[number].file).unlink()
        self.load()
        return before - self.num_bytes

    def _write_shard(self, keys: UInt64s, tensors: Mapping[str, Tensor]) -> Shard:
        from safetensors.torch import save

        rows = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        hashes = torch.from_numpy(np.ascontiguousarray(keys).view(np.uint8).reshape(-1, 16).copy())
        data = save({**rows, KEYS: hashes, CRCS: row_checksums(rows)})
        name = f"{self._start_writing()}-{self._num_written:05d}.safetensors"
        self._num_written += 1
        write_whole(self.folder / name, data)
        status = os.stat(self.folder / name)
        return Shard(name, len(keys), len(data), sha256(data).hexdigest(), status.st_mtime_ns)


def as_binary(keys: NDArray[Any]) -> pa.Array:
    """Return hashes of 16 bytes each as an Arrow column."""
    data = np.ascontiguousarray(keys)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), data.nbytes // 16, [None, pa.py_buffer(data)])


def cache_folders(parent: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folder and the descriptor of each cache inside a ``cache_dir``."""
    for path in sorted(parent.glob(f"*/{DESCRIPTOR}")):
        descriptor = json.loads(path.read_bytes())
        if path.parent.name == descriptor_hash(descriptor):
            yield path.parent, descriptor


def remove_cache(folder: Path) -> int:
    """Remove a cache's own files, and its folder if nothing else is in it; return the bytes freed."""
    freed = 0
    for pattern in ("*.safetensors", "*.jsonl", f"{PARTIAL}*", DESCRIPTOR):
        for path in folder.glob(pattern):
            freed += path.stat().st_size
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
        sync_folder(folder.parent)
    return freed
