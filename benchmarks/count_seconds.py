"""A plugin that keeps the CPU seconds that a run had spent after each optimizer step."""

from __future__ import annotations

import json
import time
from typing import Any

from distill import hookimpl

FILE = "cpu_seconds.jsonl"


@hookimpl
def on_step_end(state: Any, step: int) -> None:
    """Append a line; cheap beside a step."""
    with (state.output_dir / FILE).open("a") as file:
        file.write(json.dumps({"step": step, "seconds": time.process_time()}) + "\n")
