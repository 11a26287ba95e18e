"""Several processes on this machine, started as people start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """This process's variables as they are now; each process computes in one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def launcher(processes: int = 2) -> list[str]:
    """The command that starts so many processes of what stands behind it."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def launched(
    *command: object, processes: int = 2, timeout: float = 500, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What the processes said, which must have ended well."""
    done = subprocess.run(
        [*launcher(processes), *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done
