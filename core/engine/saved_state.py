"""The state of a run that a checkpoint holds, gathered from everything that training changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..utils.seeds import generator_states
from .checkpoint import CheckpointState
from .sharded_checkpoint import ShardedTensors, parted, with_wholes

if TYPE_CHECKING:
    from .loop import Loop
    from .networks import Networks
    from .processes import BesideTraining
    from .strategy import Strategy


def saved_state(
    loop: Loop,
    strategy: Strategy,
    *,
    step: int,
    meta: Mapping[str, Any],
    exchange: Callable[[], BesideTraining],
) -> CheckpointState:
    """Return the state that decides the future of a run.

    Where the strategy is in :attr:`.Strategy.lockstep` every process must call it; without
    :attr:`.Strategy.writes_parts` what is sharded is gathered by then, in the first one.

    Args:
        loop: Holds networks, optimizers and the method.
        strategy: How the processes share the networks.
        step: Optimizer steps taken.
        meta: What else is saved, as JSON values.
        exchange: Returns the exchanges by which the processes write their parts.
    """
    tensors = dict(loop.networks.state())
    optimizers, scalers, copies = dict[str, Any](), dict[str, Any](), set[tuple[str, str]]()
    for role, optimizer in loop.optimizers.items():
        group = f"optimizer-{role}"
        tensors[group], optimizers[role] = optimizer.state_tensors()
        scalers[role] = optimizer.scaler.state_dict() if optimizer.scaler else None
        copies |= {(group, name) for name in tensors[group] if optimizer.copies_state}
    tensors["method"] = loop.method.state_dict()
    tensors["generators"] = generator_states()
    meta = {**meta, "optimizers": optimizers, "scalers": scalers, "bad_steps": loop.health.state_dict()}
    plain, sharded = parted(tensors)
    if not strategy.writes_parts:
        copies |= {(group, name) for group, own in sharded.items() for name in own}
        plain = with_wholes(plain, sharded, keep=strategy.processes.main)
        return CheckpointState(step, plain, meta, copies=frozenset(copies))
    parts = ShardedTensors(sharded, exchange()) if sharded else None
    return CheckpointState(step, plain if strategy.processes.main else {}, meta, parts)


def changed_by_steps(networks: Networks) -> Callable[[str, str], bool]:
    """Return a test, of a group and a name, for what optimizer steps alone change.

    A forward pass may change buffers and a method's state.
    """
    weights = {f"network-{role}": networks.named_parameters(role).keys() for role in networks.roles}

    def changed(group: str, name: str) -> bool:
        return name in weights.get(group, ()) or group == "average" or group.startswith("optimizer-")

    return changed
