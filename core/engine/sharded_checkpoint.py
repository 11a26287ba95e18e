"""The sharded tensors of a checkpoint: each process writes its parts, any number of them reads what it needs.

They are files in the form of torch's distributed checkpoint: safetensors (no pickle), whose headers say which part of
which tensor they hold. A checkpoint may also hold all tensors whole: then each process takes its parts of them.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..utils.files import sync_file
from ..utils.tensor_tree import storable
from .manifest import manifest_entries
from .shards import fill_from_whole, is_sharded, offset_of, part_of, replica_of, sharded_as, whole_on_host

if TYPE_CHECKING:
    from .networks import Networks
    from .optimize import RoleOptimizer
    from .processes import BesideTraining

Groups = dict[str, dict[str, Tensor]]
"""Group name -> tensor name -> tensor."""
_SHARD = re.compile(r"shard-(\d+)-.*\.safetensors")


@dataclass
class ShardedTensors:
    """Tensors of which each process holds a part, to be written into a checkpoint's folder by all of them.

    Attributes:
        groups: By group and name, sharded; they say where in each tensor this process's part is.
        exchange: With the other processes, from whatever thread that writes.
        parts: What this process writes of them, the parts themselves unless copies of them are given.
        entries: Size and checksum of the files of all processes, once they are written.
    """

    groups: Groups
    exchange: BesideTraining
    parts: Groups = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find the parts that are this process's to write: where there are several copies, each is written once."""
        if self.parts:
            return
        for number, (name, tensor) in enumerate(flat(self.groups).items()):
            replica, replicas = replica_of(tensor)
            if number % replicas == replica and (part_of(tensor).numel() or not tensor.numel()):
                group, _, own = name.partition("/")
                self.parts.setdefault(group, {})[own] = part_of(tensor)

    @property
    def num_bytes(self) -> int:
        """The size of all parts on disk, over all processes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in flat(self.groups).values())

    def copied_to(self, parts: Groups) -> ShardedTensors:
        """Return the same, with what is written in another place."""
        return ShardedTensors(self.groups, self.exchange, parts)

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write this process's parts; return size and checksum of their file. Takes part in no exchange.

        The file is the one that torch's distributed checkpoint would write, and reads. Its own writer makes a second
        copy of it in memory and holds Python's lock meanwhile, so that training would stand still.
        """
        from safetensors.torch import save_file

        rank = torch.distributed.get_rank()
        tensors, live = flat(self.parts), flat(self.groups)
        offsets = {name: {"saved_offsets": list(offset_of(live[name]))} for name in tensors}
        header = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        path = folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        if not tensors:
            return {}
        save_file(storable(tensors), path, metadata=header)
        sync_file(path)
        return manifest_entries([path])

    def gather(self, own: dict[str, dict[str, Any]]) -> None:
        """Learn size and checksum of the files of all processes; every process must call it."""
        self.entries = {name: entry for each in self.exchange.gather(own) for name, entry in each.items()}


def parted(groups: Mapping[str, Mapping[str, Tensor]]) -> tuple[Groups, Groups]:
    """Split groups into the tensors that are whole on every process, and those that are sharded."""
    whole = {name: {n: t for n, t in group.items() if not is_sharded(t)} for name, group in groups.items()}
    sharded = {name: {n: t for n, t in group.items() if is_sharded(t)} for name, group in groups.items()}
    return {n: group for n, group in whole.items() if group}, {n: group for n, group in sharded.items() if group}


def with_wholes(whole: Groups, sharded: Groups, *, keep: bool) -> Groups:
    """Return `whole` with the sharded tensors gathered in host memory; every process must call it.

    Args:
        whole: Tensors that every process has.
        sharded: Those of which each has a part.
        keep: Whether this process gets them; the others help.
    """
    gathered = {name: whole_on_host(group, keep=keep) for name, group in sharded.items()}
    return {name: {**whole.get(name, {}), **gathered.get(name, {})} for name in {**whole, **sharded}}


def flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the tensors under ``group/name``."""
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def shapes_in(folder: Path) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """Return the whole shape and the type of each sharded tensor of a checkpoint, by group and name."""
    if not any(_SHARD.fullmatch(path.name) for path in folder.iterdir()):
        return {}
    import torch.distributed.checkpoint as dcp

    found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    with quiet_checkpoints():
        metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for key, value in metadata.items():
        group, slash, name = key.partition("/")
        if slash:  # tensors of the groups that every process holds whole lie beside them, under plain names
            found.setdefault(group, {})[name] = (value.size, value.properties.dtype)  # type: ignore[union-attr]
    return found


def read_whole(folder: Path) -> Groups:
    """Return the sharded tensors of a checkpoint whole, in host memory, by this process alone."""
    groups = {
        group: {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in tensors.items()}
        for group, tensors in shapes_in(folder).items()
    }
    _read(folder, groups, alone=True)
    return groups


def read_parts(
    folder: Path, saved: Groups, networks: Networks, optimizers: Mapping[str, RoleOptimizer], *, whole: bool
) -> None:
    """Put this process's parts of what is sharded here among the tensors of a checkpoint. Every process must call it.

    Args:
        folder: The checkpoint's, which holds those tensors whole, or in parts of its own.
        saved: Its tensors by group as :meth:`.checkpoint.CheckpointStore.load` read them; parts are put beside them.
        networks: Placed.
        optimizers: By role.
        whole: Whether `saved` has all tensors whole, also those that the checkpoint holds in parts.
    """
    written = {} if whole else shapes_in(folder)
    _, wanted = parted(networks.state())
    for role, optimizer in optimizers.items():
        group = f"optimizer-{role}"
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.get(group, {}).items()}
        wanted[group] = optimizer.empty_parts(shapes | written.get(group, {}))
    in_parts: Groups = {}
    for group, tensors in wanted.items():
        there = saved.setdefault(group, {})
        for name, tensor in tensors.items():
            if name in written.get(group, {}):
                in_parts.setdefault(group, {})[name] = tensor
            elif name in there:
                fill_from_whole(tensor, there[name])
                there[name] = tensor
    if in_parts:
        _read(folder, in_parts, alone=False)
    for group, tensors in in_parts.items():
        saved[group].update(tensors)


def _read(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], *, alone: bool) -> None:
    import torch.distributed.checkpoint as dcp

    with quiet_checkpoints():
        dcp.load(flat(groups), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)


def empty_part(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor sharded as `like`."""
    return sharded_as(torch.zeros_like(part_of(like), dtype=dtype), like)


@contextmanager
def quiet_checkpoints() -> Iterator[None]:
    """Drop notices that say nothing of a result: that one process saves alone, and how files were written."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    finally:
        logger.setLevel(before)
