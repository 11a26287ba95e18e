"""A plugin file for benchmarks: notes when a run's first step begins and ends, and the peaks of its memory."""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from distill import hookimpl
from distill.core.plugin_api.run_state import RunState
from distill.core.utils.memory import peak_memory_bytes

_NOTES: dict[str, float] = {}
_FILE = Path(os.environ["STEP_PROBE"])


@hookimpl
def on_run_start(state: RunState) -> None:
    """Everything is loaded."""
    _NOTES["first_step_begins"] = time.time()


@hookimpl
def on_step_end(state: RunState, step: int) -> None:
    """A step is done; the first one counts."""
    _NOTES.setdefault("first_step_ends", time.time())


@hookimpl
def on_log(metrics: Mapping[str, float]) -> None:
    """Metrics were read; the device's memory is that of the run until then."""
    _NOTES["memory_gib"] = metrics["memory_gib"]


@hookimpl
def on_run_end() -> None:
    """Write what was noted, for a process that goes on."""
    write()


@atexit.register
def write() -> None:
    """At the very end, so that the peak is that of the whole process."""
    _NOTES["peak_bytes"] = peak_memory_bytes()
    _FILE.write_text(json.dumps(_NOTES))
