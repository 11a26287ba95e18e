"""How long training stops for a checkpoint, and how long the checkpoint takes: medians of several saves.

    python benchmarks/checkpoints.py FOLDER [--megabytes 400] [--saves 7] [--step-seconds 0.5] [--device cpu]

The state is that of AdamW on layers of 4 million weights each: weights and two moments, in fp32. Saves are held against
the same saves for which training waits.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from distill.core.engine.async_checkpoints import BackgroundSaves
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore

LAYER = 4_000_000


def state(step: int, *, num_bytes: int, device: str) -> CheckpointState:
    """Return a state of about `num_bytes`, of a network and its optimizer."""
    count = max(1, round(num_bytes / (3 * 4 * LAYER)))
    groups = {
        name: {f"layer.{n}": torch.randn(LAYER // 1000, 1000, device=device) for n in range(count)}
        for name in ("student", "exp_avg", "exp_avg_sq")
    }
    return CheckpointState(step, groups, {"step": step})


def measured(
    folder: Path, live: CheckpointState, *, saves: int, seconds: float, enabled: bool
) -> tuple[list[float], list[float]]:
    """Return the seconds that training stops, and those until the checkpoint is complete, of each save."""
    background = BackgroundSaves(CheckpointStore(folder, limit=2), enabled=enabled)
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
    given.folder.mkdir(parents=True, exist_ok=True)
    live = state(0, num_bytes=given.megabytes * 10**6, device=given.device)
    size = sum(tensor.nbytes for group in live.tensors.values() for tensor in group.values())
    print(f"{size / 1e6:.0f} MB on {given.device}, medians of {given.saves} saves")
    for enabled in (False, True):
        folder = Path(tempfile.mkdtemp(dir=given.folder))
        stops, wholes = measured(folder, live, saves=given.saves, seconds=given.step_seconds, enabled=enabled)
        shutil.rmtree(folder)
        stop, whole = statistics.median(stops), statistics.median(wholes)
        shares = statistics.median(a / b for a, b in zip(stops, wholes, strict=True))
        print(f"checkpoint_async={enabled}: stops for {stop:.3f} s of {whole:.3f} s ({shares:.1%})")


if __name__ == "__main__":
    main()
