"""Several processes of a command, as a launcher gives them their places, without a start of Python for each.

The first call in a process starts a server, this file as a script: it imports what every run needs once, and forks.
What torchrun itself adds is kept by the tests that start it (``support/torchrun.py``).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


def forked(*command: object, processes: int = 2, **given: Any) -> subprocess.CompletedProcess[str]:
    """Return what the processes of `command` said, which must have ended well.

    Args:
        command: A script with its arguments, or ``-m`` and a module, or ``-c`` and code.
        processes: Number of processes; one has no place among others.
        given: Further arguments of `begun`.
    """
    done = ended(*command, processes=processes, **given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return done


def ended(*command: object, **given: Any) -> subprocess.CompletedProcess[str]:
    """Return what the processes said, however they ended; the arguments are those of `begun`."""
    with begun(*command, **given) as running:
        return running.wait()


@dataclass
class Running:
    """Processes at work; one command at a time.

    Attributes:
        pids: Of each process, in the order of their ranks.
        out: What they print.
        err: What they say.
    """

    pids: list[int]
    out: Path
    err: Path
    done: subprocess.CompletedProcess[str] | None = None

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return what they said, with the first exit code that is not 0, once all have ended."""
        if self.done is None:
            code = next((code for code in _heard() if code), 0)
            said = (file.read_text(errors="replace") for file in (self.out, self.err))
            self.done = subprocess.CompletedProcess("", code, *said)
        return self.done


@contextmanager
def begun(
    *command: object,
    processes: int = 1,
    timeout: float = 500,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Start the processes, which have ended after the block.

    Args:
        command: As `forked` takes it.
        processes: Number of processes.
        timeout: Seconds after which they are killed.
        cwd: Folder that they work in; absent: this process's.
        environment: Variables beside this process's; what is first in ``PYTHONPATH`` comes first.
    """
    server = _server()
    assert server.stdin
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        asked = {
            "command": list(map(str, command)), "processes": processes, "timeout": timeout,
            "cwd": str(cwd or Path.cwd()), "environment": variables, "out": str(out), "err": str(err),
        }  # fmt: skip
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        running = Running(_heard(), out, err)
        try:
            yield running
        except BaseException:
            for pid in running.pids if running.done is None else ():
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            running.wait()


def _heard() -> list[int]:
    server = _server()
    assert server.stdout
    answer = server.stdout.readline()
    assert answer, "the server that forks has ended"
    return json.loads(answer)


@cache
def _server() -> subprocess.Popen[str]:
    """Return this process's server, which ends with it."""
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    assert server.stdin
    server.stdin.close()
    server.wait(60)


# -- the server -------------------------------------------------------------------------------------------------------


def _import_all() -> None:
    import accelerate  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import torch
    import transformers
    from distill.core import cli  # noqa: F401
    from distill.core.registry.registry import Registry

    torch.set_num_threads(1)
    Registry.load(installed=False)
    for library, names in (
        (diffusers, ("AutoencoderKL", "LCMScheduler", "StableDiffusionXLPipeline", "UNet2DConditionModel")),
        (transformers, ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer")),
    ):
        for name in names:
            getattr(library, name)


def _serve() -> None:
    """Answer each line of the standard input with the exit codes of the processes that it asked for."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    _import_all()
    gc.collect()
    gc.freeze()  # else each process looks through the libraries' objects, and so copies their memory
    for line in sys.stdin:
        asked = json.loads(line)
        for file in (asked["out"], asked["err"]):
            Path(file).touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(asked["processes"]):
            pid = os.fork()
            if pid == 0:
                _become(asked, rank=rank, port=port)
                return  # to the end of the interpreter, as any program
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(_wait(pids, asked["timeout"])), file=answers, flush=True)


def _become(asked: dict[str, Any], *, rank: int, port: int) -> None:
    """Run the command as this process."""
    for number, file in ((1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(asked["environment"])
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[1:] = dict.fromkeys([*paths, *sys.path[1:]])
    if (count := asked["processes"]) > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    os.chdir(asked["cwd"])
    sys.path[0] = asked["cwd"]
    first, *rest = asked["command"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = [first, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def _wait(pids: list[int], seconds: float) -> list[int]:
    """Return their exit codes; like torchrun, end the others when one has failed."""
    deadline, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and deadline > time.monotonic() + 30:
            deadline = time.monotonic() + 30  # they name it, and end by themselves
        if time.monotonic() > deadline:
            for pid in [pid for pid in pids if pid not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    _serve()
