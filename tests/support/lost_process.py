"""Pairs of real processes over gloo, the second of which is lost in one way or another. A script: ways.

Everything is imported once, and the pairs are forks at work at the same time. Prints a line of JSON for each way.
"""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import accelerate  # noqa: F401
import torch
from distill.core.engine import heartbeats
from distill.core.engine.processes import Processes
from distill.core.errors import DistillError

TIMEOUT = 3.0


def lose(how: str) -> None:
    """What becomes of the second process."""
    match how:
        case "stopped" | "unwakeable":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "killed" | "another library":
            os.kill(os.getpid(), signal.SIGKILL)
        case "failed":
            raise MemoryError("no room for 3 GB")
        case "stuck":
            time.sleep(60)


def work(processes: Processes, how: str) -> None:
    """A few exchanges, one of them after a time as a validation takes, which has no limit."""
    with processes.training():
        with processes.synchronized():
            if processes.main:
                time.sleep(1.5 * TIMEOUT)
        for _ in range(3):
            processes.average([torch.ones(3)])
        print("trained", flush=True)
        if not processes.main:
            lose(how)
        if how == "another library":
            torch.distributed.all_reduce(torch.ones(3))
        if how == "unwakeable":  # as an exchange of another library
            heartbeats.STUCK_SECONDS = 0.5
            processes.heartbeats.on_stuck = lambda error: print("stuck:", error, flush=True)
            torch.distributed.barrier(timeout=timedelta(days=1))
        processes.average([torch.ones(3)])


def member(rank: int, port: int, how: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.ERROR)
    if how == "absent" and rank == 1:
        return
    processes = Processes("cpu", timeout_seconds=TIMEOUT)
    try:
        work(processes, how)
    except (DistillError, MemoryError, RuntimeError) as raised:
        error = processes.reason(raised) or raised
        processes.fail(error)
        print(f"{type(error).__name__}: {error}", flush=True)
        processes.close()
        sys.exit(1)


def fork(rank: int, port: int, how: str, log: Path) -> int:
    pid = os.fork()
    if pid == 0:
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
        member(rank, port, how)
        os._exit(0)
    return pid


def main() -> None:
    folder, pairs = Path(tempfile.mkdtemp()), {}
    for how in sys.argv[1:]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        pairs[how] = port, *(fork(rank, port, how, folder / f"{how}-{rank}") for rank in (0, 1))
    for how, (port, first, second) in pairs.items():
        _, status = os.waitpid(first, 0)
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)
        lines = (folder / f"{how}-0").read_text().splitlines()
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"how": how, "code": code, "lines": lines, "pid": second, "port": port}))


if __name__ == "__main__":
    main()
