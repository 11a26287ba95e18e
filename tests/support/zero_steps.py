"""Steps, a checkpoint and a loss that is not finite, under zero2 and zero3. A script for torchrun: FOLDER OUT.

`FOLDER` has a random tiny SDXL (``model``) and a checkpoint of one process after two steps (``one``). OUT gets a
checkpoint of two steps under each (``zero2``, ``zero3``) and, in ``found.json``, what happened.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore
from distill.core.engine.parallel import build_strategy
from distill.core.engine.processes import Processes
from distill.core.engine.saved_state import saved_state
from distill.core.engine.sharded_checkpoint import read_parts
from distill.core.utils.strategies import ParallelSettings
from support.sdxl_methods import Parts, make_parts
from support.sdxl_setup import make_batch
from support.strategies import CASES, digest, mine

STEPS = 2


def parts_of(folder: Path, strategy: Any) -> Parts:
    method, config = CASES["lcm-full"]
    return make_parts(
        method, folder / "model", checkpointing=True, strategy=strategy, dtype=torch.float32, total_steps=4,
        scheduler="constant", **config,
    )  # fmt: skip


def step(parts: Parts, strategy: Any, number: int, *, bad: bool = False) -> tuple[float, float]:
    """Loss and gradient norm of an optimizer step over four micro-batches; if `bad`, one of the last process is NaN."""
    processes = strategy.processes
    accumulation = 4 // processes.world_size
    batches = mine(make_batch(parts.family, 4, dtype=torch.float32), processes.rank, processes.world_size,
                   accumulation=accumulation)  # fmt: skip
    if bad and processes.rank == processes.world_size - 1:
        batches[0].latents.fill_(torch.nan)
    metrics = parts.loop.step(number, batches).metrics
    return float(metrics["loss"]), float(metrics["grad_norm"])


def state_of(parts: Parts, strategy: Any) -> CheckpointState:
    """As a trainer saves it."""
    return saved_state(parts.loop, strategy, step=STEPS, meta={}, exchange=lambda: None)


def load(parts: Parts, path: Path) -> None:
    """As a trainer resumes."""
    saved = CheckpointStore(path.parent, limit=None, read_only=True).load(path)
    read_parts(path, saved.tensors, parts.networks, parts.loop.optimizers, whole=True)
    parts.networks.load_state(saved.tensors)
    for role, optimizer in parts.loop.optimizers.items():
        optimizer.load_tensors(saved.tensors[f"optimizer-{role}"], saved.meta["optimizers"][role])


def trial(name: str, folder: Path, out: Path, processes: Processes) -> dict[str, Any]:
    strategy = build_strategy(processes, ParallelSettings(name))
    parts = parts_of(folder, strategy)
    steps = [step(parts, strategy, number) for number in range(STEPS)]
    state = state_of(parts, strategy)
    if processes.main:
        CheckpointStore(out / name, limit=None).save(state)
    del state
    load(parts, folder / "one" / f"checkpoint-{STEPS}")
    resumed = step(parts, strategy, STEPS)
    before = {group: digest(list(tensors.values())) for group, tensors in parts.networks.state().items()}
    bad = step(parts, strategy, STEPS + 1, bad=True)
    taken = parts.loop.health.state_dict()
    after = {group: digest(list(tensors.values())) for group, tensors in parts.networks.state().items()}
    with strategy.exported(parts.networks, "student") as network:
        exported = None if network is None else digest([p.detach() for p in network.parameters()])
    return {
        "steps": steps, "resumed": resumed, "bad_norm": bad[1], "health": taken, "before": before, "after": after,
        "exported": exported,
    }  # fmt: skip


def main() -> None:
    folder, out = map(Path, sys.argv[1:3])
    processes = Processes("cpu")
    found = {name: trial(name, folder, out, processes) for name in ("zero2", "zero3")}
    if processes.main:
        (out / "found.json").write_text(json.dumps(found))
    processes.close()


if __name__ == "__main__":
    main()
