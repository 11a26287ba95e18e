"""One thread for the whole suite: on tiny networks two threads that wait for each other are slower than one.

The libraries' own objects, 800,000 of them, are frozen once they are imported: a run collects garbage by itself, and
looking through them each time was a fifth of the suite.
"""

import gc
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.set_threshold(20_000, 20, 20)
_frozen_with = 0


def pytest_collection_finish():
    _freeze_what_was_imported()


def pytest_runtest_logfinish():
    _freeze_what_was_imported()


def _freeze_what_was_imported():
    global _frozen_with
    if len(sys.modules) > _frozen_with + 100:
        _frozen_with = len(sys.modules)
        gc.collect()
        gc.freeze()
        _count_once()


def _count_once(count_frozen=gc.get_freeze_count):
    """Python counts by walking through all of them, and a command asks each time: a third of its time."""
    number = count_frozen()
    gc.get_freeze_count = lambda: number


@pytest.fixture
def said():
    """Lines that the package tells people during the test."""
    from support.listening import listening

    with listening() as lines:
        yield lines


@pytest.fixture(scope="session", autouse=True)
def _equal_charts_are_drawn_once():
    """Of the reports of runs, most of which are on the same few images: drawing is a fifth of a short run."""
    from distill.core.data.report import dataset_report
    from support.drawn_once import drawn_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_report, "draw", drawn_once(dataset_report.draw))
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk():
    """A run asks 40 times that what it wrote reaches the disk, and waits; no power is cut here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses the same descriptors
        yield


@pytest.fixture(autouse=True)
def _slow_machines_say_no_more(monkeypatch):
    """What takes long on a busy machine is not said, so that lines do not depend on the load."""
    from distill.core.utils import progress

    monkeypatch.setattr(progress, "SAID_AFTER_SECONDS", 3600.0)


@pytest.fixture(autouse=True)
def _listening_ends_with_the_test():
    from support.listening import stop_listening

    yield
    stop_listening()
