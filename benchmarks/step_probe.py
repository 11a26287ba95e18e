"""A plugin file for the step benchmark: notes when a run's first step begins and ends, and the peak of its memory."""

from __future__ import annotations

import atexit
import json
import os
import time
from pathlib import Path

from distill import hookimpl
from distill.core.plugin_api.run_state import RunState
from distill.core.utils.memory import peak_memory_bytes

_NOTES: dict[str, float] = {}


@hookimpl
def on_run_start(state: RunState) -> None:
    """Everything is loaded."""
    _NOTES["first_step_begins"] = time.time()


@hookimpl
def on_step_end(state: RunState, step: int) -> None:
    """A step is done; the first one counts."""
    _NOTES.setdefault("first_step_ends", time.time())


@atexit.register
def write() -> None:
    """At the very end, so that the peak is that of the whole process."""
    _NOTES["peak_bytes"] = peak_memory_bytes()
    Path(os.environ["STEP_PROBE"]).write_text(json.dumps(_NOTES))
