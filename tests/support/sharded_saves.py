"""Two real processes over gloo that save sharded tensors while they go on. A script: FOLDER.

Everything is imported once and the processes are forks. Each writes what it saw into ``FOLDER/seen-<rank>.json``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import torch
from distill.core.engine import async_checkpoints
from distill.core.engine.async_checkpoints import BackgroundSaves
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore
from distill.core.engine.processes import BesideTraining, Processes
from distill.core.engine.sharded_checkpoint import ShardedTensors
from distill.core.errors import DistillError
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

WEIGHTS = {"matrix": torch.arange(20.0).view(5, 4), "bias": torch.arange(7).bfloat16(), "one": torch.ones(1, 3)}
"""Cut into parts of 3 and 2 rows, of 4 and 3 elements, and of one row and none."""
async_checkpoints.free_memory_bytes = lambda: 1 << 40


class Member:
    """One of the processes."""

    def __init__(self, folder: Path) -> None:
        self.processes = Processes("cpu", timeout_seconds=30)
        self.rank, self.seen = self.processes.rank, dict[str, Any]()
        self.store = CheckpointStore(folder / "out", limit=None, read_only=self.rank != 0)
        self.saves = BackgroundSaves(self.store)
        self.exchange = BesideTraining(self.processes)

    def state(self, step: int, *, copies: bool = False) -> CheckpointState:
        shape, names = ((2, 1), ("replicate", "shard")) if copies else ((2,), ("shard",))
        mesh, placements = init_device_mesh("cpu", shape, mesh_dim_names=names), [Replicate(), Shard(0)][-len(shape) :]
        sharded = {"network": {n: distribute_tensor(t + step, mesh, placements) for n, t in WEIGHTS.items()}}
        whole = {"adapter": {"weight": torch.full((3,), float(step))}} if self.rank == 0 else {}
        return CheckpointState(step, whole, {"step": step}, ShardedTensors(sharded, self.exchange))

    def parts(self, state: CheckpointState) -> dict[str, torch.Tensor]:
        return {name: tensor.to_local() for name, tensor in state.sharded.groups["network"].items()}

    def complete(self) -> list[str]:
        """The folders there are, once both processes have ended their save."""
        self.processes.barrier()
        found = sorted(path.name for path in self.store.output_dir.iterdir())
        self.processes.barrier()
        return found

    def is_right(self, step: int) -> bool:
        state = self.store.load(self.store.output_dir / f"checkpoint-{step}")
        return all(torch.equal(state.tensors["network"][n], t + step) for n, t in WEIGHTS.items()) and torch.equal(
            state.tensors["adapter"]["weight"], torch.full((3,), float(step))
        )

    @contextmanager
    def writes(self, replaced: Any) -> Iterator[None]:
        real = ShardedTensors.write
        ShardedTensors.write = lambda sharded, folder: replaced(lambda: real(sharded, folder))
        try:
            yield
        finally:
            ShardedTensors.write = real

    def raised(self) -> str:
        try:
            self.saves.finish()
        except (DistillError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    # -- what happens -------------------------------------------------------------------------------------------------

    def goes_on(self) -> None:
        """All changes while both processes have yet to write."""
        held, state = threading.Event(), self.state(1)
        with self.writes(lambda write: held.wait(60) and write()):
            self.saves.begin(state, stepped=lambda group, name: name == "matrix")
            parts = self.parts(state)
            parts["bias"].zero_()
            self.saves.wait_copied()
            parts["matrix"].zero_()
            self.seen["ended before it was written"] = self.saves.ended
            self.seen["before"] = [name for name in self.complete() if name.startswith("checkpoint")]
            self.processes.average([torch.ones(2)])  # training's own exchanges go on
            held.set()
            self.saves.finish()
        self.seen["complete where it returns"] = (self.store.output_dir / "checkpoint-1").is_dir()
        self.seen["right"] = self.is_right(1)

    def one_cannot_write(self) -> None:
        def full(write: Any) -> Any:
            if self.rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write()

        with self.writes(full):
            self.saves.begin(self.state(2))
            self.seen["one cannot write"] = self.raised()
        self.seen["left by it"] = self.complete()

    def the_first_has_no_room(self) -> None:
        real = self.store._make_room
        self.store._make_room = lambda num_bytes: (_ for _ in ()).throw(MemoryError("no room at all"))
        self.saves.begin(self.state(3))
        try:
            self.saves.finish()
        except (DistillError, MemoryError) as error:
            self.seen["the first has no room"] = f"{type(error).__name__}: {error}"
        self.store._make_room = real

    def copies(self) -> None:
        """Each process has the whole of each tensor, and writes some of them."""
        self.saves.begin(self.state(4, copies=True))
        self.saves.finish()
        self.seen["copies are right"] = self.is_right(4)
        sizes = [path.stat().st_size for path in self.store.output_dir.glob("checkpoint-4/shard-*")]
        self.seen["files of copies"] = len(sizes)

    def one_is_killed(self) -> None:
        def killed(write: Any) -> Any:
            if self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return write()

        with self.writes(killed):
            self.saves.begin(self.state(5))
            self.seen["one is killed"] = self.raised()
        self.seen["left in the end"] = sorted(path.name for path in self.store.output_dir.iterdir())


def main() -> None:
    folder = Path(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [os.fork() or _work(rank, port, folder) for rank in (0, 1)]
    for pid in pids:
        os.waitpid(pid, 0)


def _work(rank: int, port: int, folder: Path) -> int:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    member = Member(folder)
    for act in (member.goes_on, member.one_cannot_write, member.the_first_has_no_room, member.copies):
        act()
        (folder / f"seen-{rank}.json").write_text(json.dumps(member.seen))
    member.one_is_killed()
    (folder / f"seen-{rank}.json").write_text(json.dumps(member.seen))
    os._exit(0)


if __name__ == "__main__":
    main()
