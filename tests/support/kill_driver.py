"""Runs configurations again and again, killing them with SIGKILL at random moments, until each has come to its end.

Everything is imported once and each attempt is a fork, so that an attempt takes seconds. Prints, for each, the number
of kills, and how many of them came while it saved.

    python kill_driver.py SEED NUM_KILLS SECONDS IMPORTS.txt CONFIG OUTPUT [CONFIG OUTPUT ...]

SECONDS is the latest of the random moments, IMPORTS.txt names the modules that such a run loads, one on a line.
"""

import gc
import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

torch.set_num_threads(1)
import diffusers  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401
from support.small_run import execute


def attempt(config: Path, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            execute(config)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)


def reap(pid: int, log: Path) -> bool:
    """Whether the process has ended; one that failed ends everything."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended and status:
        sys.exit(f"an attempt failed by itself:\n{log.read_text()[-4000:]}")
    return bool(ended)


def wait_for_moment(pid: int, output: Path, rng: random.Random, latest: float, *, while_saving: bool) -> bool:
    """True when the process is still there at the moment chosen: a time, or while a checkpoint is being written."""
    log = output.with_suffix(".log")
    deadline = time.monotonic() + rng.uniform(0.2, 1.0) * latest
    skip = rng.randrange(2)
    while not reap(pid, log):
        if while_saving and list(output.glob(".checkpoint-*.partial")):
            if skip == 0:
                time.sleep(rng.uniform(0, 0.01))
                return True
            skip -= 1
            while list(output.glob(".checkpoint-*.partial")):
                time.sleep(0.0005)  # a process that dies here leaves its partial: bounded by the caller's time limit
        if not while_saving and time.monotonic() > deadline:
            return True
        time.sleep(0.0005)
    return False


def main() -> None:
    seed, num_kills, seconds, imports, *runs = sys.argv[1:]
    for name in Path(imports).read_text().split():
        importlib.import_module(name)
    gc.freeze()  # an attempt collects garbage, and these are its parent's
    for config, output in zip(runs[::2], runs[1::2], strict=True):
        until_the_end(Path(config), Path(output), seed=int(seed), num_kills=int(num_kills), latest=float(seconds))


def until_the_end(config: Path, output: Path, *, seed: int, num_kills: int, latest: float) -> None:
    rng, log, kills, saving = random.Random(seed), output.with_suffix(".log"), 0, 0
    while kills < num_kills:
        pid = attempt(config, log)
        while_saving = kills % 2 == 0
        if not wait_for_moment(pid, output, rng, latest, while_saving=while_saving):
            break
        saving += while_saving
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    if not (output / "student").exists():
        _, status = os.waitpid(attempt(config, log), 0)
        if status:
            sys.exit(f"the last attempt failed:\n{log.read_text()[-4000:]}")
    print(output.name, kills, saving, flush=True)


if __name__ == "__main__":
    main()
