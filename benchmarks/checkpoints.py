"""How long training stops for a checkpoint, and how long the checkpoint takes: medians of several saves.

    python benchmarks/checkpoints.py FOLDER [--megabytes 400] [--saves 7] [--step-seconds 0.5] [--device cpu]
    torchrun --nproc_per_node 2 benchmarks/checkpoints.py FOLDER ...

The state is that of AdamW on layers of 4 million weights each: weights and two moments, in fp32. Saves are held against
the same saves for which training waits. Several processes divide the state as fsdp does, and each writes its parts; the
figures are those of the first one.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
from distill.core.engine.async_checkpoints import BackgroundSaves
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore
from distill.core.engine.processes import BesideTraining, Processes
from distill.core.engine.sharded_checkpoint import ShardedTensors
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

LAYER = 4_000_000


def state(step: int, *, num_bytes: int, device: str, processes: Processes) -> CheckpointState:
    """Return a state of about `num_bytes` over all processes, of a network and its optimizer."""
    count = max(1, round(num_bytes / (3 * 4 * LAYER)))
    groups = {
        name: {f"layer.{n}": torch.randn(LAYER // 1000, 1000, device=device) for n in range(count)}
        for name in ("student", "exp_avg", "exp_avg_sq")
    }
    if processes.world_size == 1:
        return CheckpointState(step, groups, {"step": step})
    mesh = init_device_mesh(device, (processes.world_size,), mesh_dim_names=("shard",))
    sharded = {
        name: {layer: distribute_tensor(tensor, mesh, [Shard(0)]) for layer, tensor in group.items()}
        for name, group in groups.items()
    }
    return CheckpointState(step, {}, {"step": step}, ShardedTensors(sharded, BesideTraining(processes)))


def measured(
    store: CheckpointStore, live: CheckpointState, *, saves: int, seconds: float, enabled: bool
) -> tuple[list[float], list[float]]:
    """Return the seconds that training stops, and those until the checkpoint is complete, of each save."""
    background = BackgroundSaves(store, enabled=enabled)
    stops, wholes = [], []
    for step in range(1, saves + 2):
        live.step = step
        start = time.perf_counter()
        background.begin(live, stepped=lambda group, name: True)
        stops.append(time.perf_counter() - start)
        compute(seconds)  # as the next step does, up to where it changes weights
        before = time.perf_counter()
        background.wait_copied()
        stops[-1] += time.perf_counter() - before
        background.finish()
        wholes.append(time.perf_counter() - start)
    return stops[1:], wholes[1:]  # the first one takes the buffer's memory from the system


def compute(seconds: float) -> None:
    """Multiply matrices for so long."""
    end, matrix = time.perf_counter() + seconds, torch.randn(512, 512)
    while time.perf_counter() < end:
        matrix = torch.softmax(matrix @ matrix, dim=1)


def main() -> None:
    """Print both as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--step-seconds", type=float, default=0.5, help="of a step's forward and backward pass")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    processes = Processes(given.device)
    live = state(0, num_bytes=given.megabytes * 10**6, device=given.device, processes=processes)
    size = sum(tensor.nbytes for group in live.tensors.values() for tensor in group.values())
    size += live.sharded.num_bytes if live.sharded else 0
    emit = print if processes.main else lambda line: None
    emit(f"{size / 1e6:.0f} MB on {given.device}, {processes.described}, medians of {given.saves} saves")
    for enabled in (False, True):
        folder = given.folder / f"async-{enabled}"
        store = CheckpointStore(folder, limit=2, read_only=not processes.main)
        stops, wholes = measured(store, live, saves=given.saves, seconds=given.step_seconds, enabled=enabled)
        processes.barrier()
        if processes.main:
            shutil.rmtree(folder)
        stop, whole = statistics.median(stops), statistics.median(wholes)
        shares = statistics.median(a / b for a, b in zip(stops, wholes, strict=True))
        emit(f"checkpoint_async={enabled}: stops for {stop:.3f} s of {whole:.3f} s ({shares:.1%})")
    processes.close()


if __name__ == "__main__":
    main()
