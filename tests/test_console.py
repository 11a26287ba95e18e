"""Lines for people: printed as they are, once, by one process, above the bar, and kept in the run's log."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading

import distill
import pytest
from distill.core.utils.console import PACKAGE, Console, console
from distill.core.utils.progress import make_progress

logger = logging.getLogger("distill.core.somewhere")


def test_lines_are_printed_as_they_are_and_what_is_worse_by_its_level(capsys):
    with console():
        logger.debug("not this")
        logger.info("100% of %s, {braces} and\ntwo lines")
        logger.warning("slow")
        logger.error("broken")
    logger.info("nor this")
    assert capsys.readouterr().err == "100% of %s, {braces} and\ntwo lines\nwarning: slow\nerror: broken\n"


def test_blocks_inside_blocks_speak_once_and_leave_everything_as_it_was(capsys):
    before = list(PACKAGE.handlers), PACKAGE.level, PACKAGE.propagate
    with console(propagate=False):
        with console():
            assert not PACKAGE.propagate, "the outer block has stderr to itself"
            logger.info("inner")
        with pytest.raises(ZeroDivisionError), console():
            raise ZeroDivisionError
        logger.info("outer")
    assert capsys.readouterr().err == "inner\nouter\n"
    assert (PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate) == before


def test_other_processes_than_the_first_say_nothing(capsys):
    noted: list[str] = []
    with console(), console(enabled=False, note=noted.append):
        logger.warning("rank 1")
    assert capsys.readouterr().err == ""
    assert noted == []


def test_a_run_s_log_gets_each_line_also_from_threads(capsys):
    noted: list[str] = []
    with console(note=noted.append):
        threads = [threading.Thread(target=logger.info, args=(f"from thread {i}",)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(noted) == sorted(f"from thread {i}" for i in range(20))
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(noted)


def test_a_line_that_cannot_be_kept_ends_nothing(capsys):
    def full(line: str) -> None:
        raise OSError(28, "no space left")

    with console(note=full):
        logger.info("x")
    assert "no space left" in capsys.readouterr().err


def test_lines_appear_above_a_bar_that_is_live(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console(), make_progress(10, samples_per_step=1) as progress:
        progress.advance(3)
        logger.info("saved [checkpoint-3] :warning:")
        progress.advance(10)
    shown = terminal.getvalue()
    line = shown.index("saved [checkpoint-3] :warning:")
    assert shown.rindex("\x1b[2K", 0, line) < line, "the bar is wiped before the line"
    assert "10/10" in shown[line:], "and drawn again below it"


def test_as_a_library_it_is_silent_and_its_records_reach_other_handlers(caplog):
    code = "import distill, logging; logging.getLogger('distill.core.x').error('unheard')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with caplog.at_level(logging.INFO, "distill"), console():
        logger.info("heard")
    assert caplog.messages == ["heard"]


def test_its_own_logger_is_the_package_s():
    assert PACKAGE.name == distill.__name__
    assert not [handler for handler in PACKAGE.handlers if isinstance(handler, Console)]
