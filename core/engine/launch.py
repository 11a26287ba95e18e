"""What the launcher of the processes asked for, and whether this is it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping

from ..errors import UserError

logger = logging.getLogger(__name__)
COMMAND = "torchrun --standalone --nproc_per_node N -m distill run ..."
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm: Megatron-LM brings its own training loop",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config: tensor and context parallelism split the layers "
    "that adapters are put on",
}
"""Variable that ``accelerate launch`` sets -> the option, and why it cannot be."""
POLL_SECONDS = 1.0
LAST_SECONDS = 120.0
"""Time that a process without its launcher gets to finish its step and save."""


def check_launch(environment: Mapping[str, str], *, world_size: int) -> None:
    """Compare the processes there are with those that a launcher asked for.

    Args:
        environment: Variables of this process.
        world_size: Number of processes in the group.

    Raises:
        UserError: A strategy was asked for that does not exist here, or more processes than there are.
    """
    for variable, reason in REFUSED.items():
        if environment.get(variable, "false").lower() == "true":
            raise UserError(f"accelerate launch {reason}", f"launch without it: `{COMMAND}`")
    asked = environment.get("WORLD_SIZE", "1")
    if asked.isdecimal() and int(asked) > world_size:
        raise UserError(
            f"the launcher started {asked} processes (WORLD_SIZE), and this one is alone: they would each train a "
            "student of their own",
            f"launch with `{COMMAND}`",
        )
    # accelerate launch --cpu --num_processes 2 starts one process, and leaves only these two behind
    if world_size == 1 and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys() and "RANK" not in environment:
        raise UserError(
            "accelerate launch --cpu with several processes starts one alone (it needs MPI for more)",
            f"launch with `{COMMAND}`, or with --num_processes 1",
        )


def watch_launcher(*, world_size: int) -> None:
    """End this process in an orderly way when the one that launched it is gone: its run saves and stops.

    A launcher that is killed cannot tell its processes, and they would train on without anybody who restarts them.
    """
    if world_size > 1:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    logger.warning("the launcher of this process is gone: the run saves and stops")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_SECONDS)
    os._exit(1)
