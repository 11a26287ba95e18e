"""``report.html`` at the end of every run, also of a failed one. Its own failure is reported and ends nothing."""

from __future__ import annotations

import logging

from ..core.errors import described
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.run_state import RunState
from ..core.report.page import FILE, write_report

logger = logging.getLogger(__name__)


@hookimpl
def on_run_start(state: RunState) -> None:
    """Remove the page of an earlier run when a run starts afresh."""
    if state.main and state.step == 0:
        (state.output_dir / FILE).unlink(missing_ok=True)


@hookimpl
def on_run_end(state: RunState) -> None:
    """Write the page of the finished run."""
    _write(state)


@hookimpl
def on_exception(state: RunState, error: BaseException) -> None:
    """Write the page of a failed run, with what there is."""
    _write(state)


def _write(state: RunState) -> None:
    if not state.main:
        return
    try:
        logger.info(f"report: {write_report(state.output_dir)}")
    except Exception as error:  # hours of training are done: that a page is missing is said, and no more
        logger.warning(f"{FILE} could not be written; later: distill report {state.output_dir}: {described(error)}")
