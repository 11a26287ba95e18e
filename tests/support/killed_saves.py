"""Saves checkpoints in child processes that are killed; prints what was left each time, as JSON. Run as a script.

python killed_saves.py FOLDER random COUNT      SIGKILL from outside, at random moments
python killed_saves.py FOLDER calls COUNT       SIGKILL by itself at its 1st, 2nd, ... file operation
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def content(step: int) -> CheckpointState:
    weights = {f"layer.{n}": torch.full((64, 257), float(step * 10 + n)) for n in range(6)}
    moments = {"exp_avg": torch.arange(20_000, dtype=torch.float64) * step, "step": torch.tensor(float(step))}
    return CheckpointState(step, {"student": weights, "optimizer": moments}, {"step": step, "loss": step / 3})


def save_forever(folder: Path, parent: int, ready: int) -> None:
    store = CheckpointStore(folder, limit=2)
    os.write(ready, b"!")
    latest = store.latest()
    step = int(latest.name.split("-")[1]) if latest else 0
    for number in itertools.count():
        if os.getppid() != parent:  # the parent itself was killed, so nobody will kill this process
            return
        step += number % 3 != 2  # every third save replaces a checkpoint of the same step
        store.save(content(step), step=step)


def child(folder: Path, kill_at: int | None) -> int:
    """The process id of a child that saves until it is killed; returns when it is about to begin, or is dead."""
    parent = os.getpid()
    begun, ready = os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready)
        os.read(begun, 1)
        os.close(begun)
        return pid
    if kill_at is not None:
        count = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            count += event in OPERATIONS
            if event in OPERATIONS and count >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    try:
        save_forever(folder, parent, ready)
    except BaseException as error:
        print("child failed:", repr(error), file=sys.stderr, flush=True)
    os._exit(1)


def seconds_of_a_save(folder: Path) -> float:
    """On this machine, as busy as it is now."""
    store, start = CheckpointStore(folder, limit=2), time.perf_counter()
    for step in range(1, 6):
        store.save(content(step))
    return (time.perf_counter() - start) / 5


def verdict(folder: Path) -> dict[str, object]:
    """What a resuming process finds: it may only read, first, since evaluation may look before any run cleans up."""
    seen = CheckpointStore(folder, limit=2, read_only=True).latest()
    leftovers = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    store = CheckpointStore(folder, limit=2)
    latest = store.latest()
    right = None
    if latest is not None:
        state = store.load(latest)
        expected = content(state.step)
        right = state.meta == expected.meta and all(
            torch.equal(state.tensors[group][name], tensor)
            for group, tensors in expected.tensors.items()
            for name, tensor in tensors.items()
        )
    return {
        "seen": seen and int(seen.name.split("-")[1]),
        "step": latest and state.step,
        "right": right,
        "leftovers": leftovers,
        "after": sorted(path.name for path in folder.iterdir()),
    }


def main(folder: Path, mode: str, count: int) -> None:
    torch.set_num_threads(1)
    moments = random.Random(0)
    duration = seconds_of_a_save(folder.parent / f"{folder.name}-timing")
    for number in range(count):
        pid = child(folder, number + 1 if mode == "calls" else None)
        if mode == "random":
            time.sleep(moments.uniform(0, 4 * duration))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": killed, **verdict(folder)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
