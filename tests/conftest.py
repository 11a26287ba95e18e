"""One thread for the whole suite: on tiny networks two threads that wait for each other are slower than one."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def said():
    """Lines that the package tells people during the test."""
    from support.listening import listening

    with listening() as lines:
        yield lines


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
