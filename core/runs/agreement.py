"""What all processes of a run must have in common, compared before anything is trained."""

from __future__ import annotations

import hashlib
import json
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from .output_folder import flattened

if TYPE_CHECKING:
    from ..engine.networks import Networks
    from ..engine.processes import Processes
    from ..settings.configuration import Configuration

NAMED = 5
"""Most differences that a message names."""
TOKEN = ".processes"
"""File that shows whether all processes see one folder."""
REMEDY = "start every process with the same command, the same files and the same packages"


def require_same_configuration(processes: Processes, configuration: Configuration) -> None:
    """Raise UserError, in every process, where their configurations differ; every process must call it."""
    if processes.world_size == 1:
        return
    resolved = json.loads(json.dumps(configuration.resolved(), default=str))
    _require_same(processes, dict(flattened(resolved)), what="the configurations of the processes differ")


def require_shared_folder(processes: Processes, folder: Path) -> None:
    """Raise UserError, in every process, where some do not see the folder that the first one has opened."""
    if processes.world_size == 1:
        return
    token = folder / TOKEN
    with processes.synchronized():
        if processes.main:
            token.write_text(uuid.uuid4().hex)
    seen = token.read_text() if token.is_file() else None
    found = processes.gather((socket.gethostname(), seen))
    if processes.main:
        token.unlink()
    apart = sorted({host for host, content in found if content != found[0][1]})
    if apart:
        raise UserError(
            f"output_dir = {folder} is not the same folder for all processes: that of {found[0][0]} is not seen by "
            f"{', '.join(apart)}",
            "use a folder that all machines share, for output_dir and for caches (docs: several processes)",
        )


def require_same_start(
    processes: Processes, networks: Networks, *, step: int, data: str, sharded: bool = False
) -> None:
    """Raise UserError, in every process, where they would not train the same weights on the same samples.

    Args:
        processes: Those of the run.
        networks: Made, and read from a checkpoint if there is one.
        step: The step that training begins at.
        data: Fingerprint of the samples and their order.
        sharded: Whether each holds parts of the weights, which were compared while they were whole.
    """
    if processes.world_size == 1:
        return
    values: dict[str, Any] = {"the first step": step, "the samples": data}
    if not sharded:
        values |= _weights(networks)
    _require_same(processes, values, what="the processes begin from different states")


def require_same_weights(processes: Processes, networks: Networks) -> None:
    """Raise UserError, in every process, where the weights that are trained differ; they are whole by now."""
    if processes.world_size > 1:
        _require_same(processes, _weights(networks), what="the processes begin from different weights")


def _weights(networks: Networks) -> dict[str, str]:
    values: dict[str, str] = {}
    for role in networks.trained_roles():
        named = networks.named_parameters(role)
        values[f"the trained parameters of {role}"] = _digest([f"{name} {tuple(p.shape)}" for name, p in named.items()])
        values[f"the weights of {role}"] = _sums(list(named.values()))
    return values


def _require_same(processes: Processes, own: Mapping[str, Any], *, what: str) -> None:
    found: Sequence[Mapping[str, Any]] = processes.gather(dict(own))
    first, lines = found[0], []
    for rank, values in enumerate(found):
        for key in dict.fromkeys([*first, *values]):
            if first.get(key) != values.get(key):
                lines.append(f"{key} is {first.get(key)!r} in process 0 and {values.get(key)!r} in process {rank}")
    if lines:
        more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        raise UserError(f"{what}: {'; '.join(lines[:NAMED])}{more}", REMEDY)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


@torch.no_grad()
def _sums(tensors: Sequence[torch.Tensor]) -> str:
    """Return a digest of each tensor's sum and sum of squares, which costs no copy of the weights."""
    if not tensors:
        return ""
    sums = torch.stack([torch.stack([t.double().sum(), t.double().square().sum()]) for t in tensors])
    return _digest([repr(number) for number in sums.flatten().tolist()])
