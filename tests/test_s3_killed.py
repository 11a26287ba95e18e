"""A whole run on a bucket whose server's process is killed in its middle, and started again or not."""

import threading
import time
from pathlib import Path

import pytest
from distill.core.engine.remote_checkpoints import MirroredStore
from distill.core.errors import OutOfReach
from support.s3_server import S3Server, without_account
from support.small_run import execute, losses, write_images
from test_mirror import check_whole
from test_s3_faults import configure, same_student

pytestmark = pytest.mark.slow
STEPS = (2, 4, 6)


@pytest.fixture
def server(tmp_path, monkeypatch):
    without_account(monkeypatch)
    (tmp_path / "server").mkdir()
    server = S3Server(tmp_path / "server")
    server.fill(server.bucket("data"), "images", write_images(tmp_path / "images"))
    yield server
    server.close()


class Outages:
    """The server is killed, or frozen, when the n-th request of a kind comes in, for each (beginning, n) in turn.

    Args:
        server: The server.
        moments: Beginning of ``METHOD /bucket/key``, and how many of them to let come.
        away: Seconds until it is started again; None leaves it dead.
        frozen: Stop the process for that time instead of killing it.
    """

    def __init__(self, server: S3Server, *moments: tuple[str, int], away: float | None, frozen: bool = False) -> None:
        self.server, self.moments, self.away = server, moments, away
        self._begin, self._end = (server.freeze, server.thaw) if frozen else (server.kill, server.revive)
        self.done, self._stop, self._since = 0, threading.Event(), len(server.requests())
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        for beginning, count in self.moments:
            while sum(line.startswith(beginning) for line in self.server.requests()[self._since :]) < count:
                if self._stop.wait(0.002):
                    return
            self._begin()
            self.done += 1
            if self.away is None:
                return
            time.sleep(self.away)
            self._end()


def manifests(server: S3Server, prefix: str) -> set[int]:
    """Steps of the complete checkpoints in the bucket."""
    keys = server.objects("data", f"{prefix}/checkpoints/")
    return {int(key.split("/")[2].removeprefix("checkpoint-")) for key in keys if key.endswith("/manifest.json")}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_rides_out_a_server_that_is_killed_or_silent_again_and_again(tmp_path, server, frozen):
    execute(configure(tmp_path, "whole", server, server.endpoint, "whole"))
    moments = [
        ("GET /data/images", 9),
        ("PUT /data/ridden/texts", 2),
        ("PUT /data/ridden/latents", 3),
        ("PUT /data/ridden/checkpoints/checkpoint-2", 2),
        ("PUT /data/ridden/checkpoints/checkpoint-6", 1),
    ]
    with Outages(server, *moments, away=2 if frozen else 0.5, frozen=frozen) as outages:
        execute(configure(tmp_path, "ridden", server, server.endpoint, "ridden", patience=12, timeout=0.7))
    assert outages.done == len(moments)
    assert losses(tmp_path / "ridden") == losses(tmp_path / "whole")
    assert same_student(tmp_path / "whole", tmp_path / "ridden")
    assert check_whole(server, "data") > 0
    assert manifests(server, "ridden") == set(STEPS)


@pytest.mark.parametrize("moment", [("GET /data/images", 9), ("PUT /data/cut/latents", 3)])
def test_a_run_whose_server_stays_dead_while_it_caches_ends_resumable(tmp_path, server, moment):
    execute(configure(tmp_path, "whole", server, server.endpoint, "whole"))
    file = configure(tmp_path, "cut", server, server.endpoint, "cut")
    started = time.monotonic()
    with Outages(server, moment, away=None) as outages, pytest.raises(OutOfReach) as caught:
        execute(file)
    assert outages.done == 1
    assert time.monotonic() - started < 60
    assert caught.value.exit_code == 1
    assert "resume_from_checkpoint=latest" in str(caught.value)
    server.revive()
    check_whole(server, "data")
    execute(file)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same_student(tmp_path / "whole", tmp_path / "cut")
    assert check_whole(server, "data") > 0


def test_a_run_whose_server_dies_while_it_trains_goes_on(tmp_path, server, monkeypatch, capsys):
    execute(configure(tmp_path, "whole", server, server.endpoint, "whole"))
    copy = MirroredStore._copy

    def copied(self, paths: list[Path]) -> list[Path]:
        left = copy(self, paths)
        if left and not server.running:
            server.revive()
        return left

    monkeypatch.setattr(MirroredStore, "_copy", copied)
    with Outages(server, ("PUT /data/cut/checkpoints/checkpoint-2", 2), away=None) as outages:
        execute(configure(tmp_path, "cut", server, server.endpoint, "cut"))
    assert outages.done == 1
    assert "checkpoint-2 is complete here but could not be copied" in capsys.readouterr().err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same_student(tmp_path / "whole", tmp_path / "cut")
    assert manifests(server, "cut") == set(STEPS), "what could not be copied was made up for"


def test_a_run_whose_server_never_comes_back_has_all_of_its_results_here(tmp_path, server, capsys):
    execute(configure(tmp_path, "whole", server, server.endpoint, "whole"))
    file = configure(tmp_path, "cut", server, server.endpoint, "cut")
    with Outages(server, ("PUT /data/cut/checkpoints/checkpoint-2", 2), away=None):
        execute(file)
    said = capsys.readouterr().err
    assert "not copied to s3://data/cut/checkpoints/: checkpoint-2, checkpoint-4, checkpoint-6" in said
    assert same_student(tmp_path / "whole", tmp_path / "cut")
    server.revive()
    assert manifests(server, "cut") == set()
    check_whole(server, "data")
