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
def _listening_ends_with_the_test():
    from support.listening import stop_listening

    yield
    stop_listening()
