"""Two processes and one folder: the second is refused by name, and a dead one's lock is taken over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from distill.core.data.cache.tensor_cache import TensorCache
from distill.core.errors import UserError
from distill.core.runs.run_lock import lock_folder, refuse_while_running
from distill.core.utils import locks
from distill.core.utils.locks import FolderInUse, FolderLock
from support.quickstart import command
from support.small_run import execute, losses, write_run

HOLD = """
import sys, time
from pathlib import Path
from distill.core.utils.locks import FolderLock
FolderLock(Path(sys.argv[1]), name="run").acquire()
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock on `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_with_host_and_process(tmp_path, other):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        lock_folder(tmp_path)
    assert f"is in use by another run: process {other.pid} on {os.uname().nodename}, begun 20" in error.value.message
    assert error.value.exit_code == 2
    with pytest.raises(UserError, match=str(other.pid)):
        refuse_while_running(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_lock_of_a_dead_process_is_taken_over_and_said(tmp_path, other, said):
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = lock_folder(tmp_path)
    assert said == [
        line for line in said if f"was left by process {other.pid} on" in line and "it is taken over" in line
    ]
    assert len(said) == 1
    lock.release()
    assert lock_folder(tmp_path).release() is None
    assert len(said) == 1, "a lock that was released leaves nothing to say"


def test_a_process_that_stands_still_keeps_its_lock(tmp_path, other):
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(FolderInUse):
        FolderLock(tmp_path, name="run").acquire()


def test_removing_the_lock_file_does_not_free_the_folder(tmp_path, other):
    (tmp_path / ".run.lock").unlink()
    with pytest.raises(FolderInUse, match=str(other.pid)):
        FolderLock(tmp_path, name="run").acquire()


@pytest.fixture
def of_another_machine(tmp_path):
    """A lock that another machine signed; no lock of this machine's system lies on it."""
    lock = FolderLock(tmp_path, name="run")
    lock.acquire()
    holder = lock.holder()
    lock.release()
    assert holder is not None
    written = json.dumps(asdict(replace(holder, host="far", machine="another", token="theirs")))
    (tmp_path / ".run.holder.json").write_text(written)
    return tmp_path / ".run.holder.json"


def test_another_machine_counts_as_long_as_it_gives_signs_of_life(tmp_path, of_another_machine, said):
    with pytest.raises(
        UserError, match=r"on far, begun .* \(last heard of \d s ago; if that machine is gone, try again"
    ):
        lock_folder(tmp_path)
    silent = of_another_machine.stat().st_mtime - locks.SILENT_SECONDS - 1
    os.utime(of_another_machine, (silent, silent))
    lock_folder(tmp_path).release()
    assert "on far" in said[0]
    assert "taken over" in said[0]


def test_signs_of_life_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    lock = FolderLock(tmp_path, name="run")
    lock.acquire()
    os.utime(lock.holder_file, (0, 0))
    deadline = time.monotonic() + 10
    while lock.holder_file.stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


@pytest.mark.parametrize("refusal", [NotImplementedError(), OSError(38, "not implemented"), OSError(37, "no locks")])
def test_without_locks_of_the_file_system_the_signs_of_life_decide(tmp_path, monkeypatch, refusal):
    def acquire(*_, **__):
        raise refusal

    monkeypatch.setattr(locks, "MEET_SECONDS", 0.05)
    first, second = FolderLock(tmp_path, name="run"), FolderLock(tmp_path, name="run")
    for lock in (first, second):
        monkeypatch.setattr(lock._lock, "acquire", acquire)
    first.acquire()
    with pytest.raises(FolderInUse, match=str(os.getpid())):
        second.acquire()
    first.release()
    assert second.acquire() is None
    second.release()


def test_two_that_sign_at_the_same_moment_do_not_both_go_on(tmp_path, monkeypatch):
    first, second = FolderLock(tmp_path, name="run"), FolderLock(tmp_path, name="run")
    monkeypatch.setattr(first, "_lock_file", lambda: False)
    monkeypatch.setattr(locks.time, "sleep", lambda _: second._sign())
    with pytest.raises(FolderInUse):
        first.acquire()


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_is_refused_in_a_folder_in_use_and_touches_nothing(tmp_path):
    config = write_run(tmp_path, max_train_steps=2, validation_step_interval=0)
    execute(config)
    out = tmp_path / "out"
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lock = lock_folder(out)
    try:
        for flags in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match=f"in use by another run: process {os.getpid()}"):
                execute(config, **flags)
        for arguments in (["publish", str(out)], ["cache", "clear", "--yes", "--config", str(config)],
                          ["cache", "build", "--config", str(config)]):  # fmt: skip
            said = command(*arguments)
            assert said.code == 2, said.err
            assert f"process {os.getpid()}" in said.err
    finally:
        lock.release()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name[0] != "."} == {
        path: content for path, content in files.items() if path.name[0] != "."
    }


def test_two_writers_of_one_cache_do_not_disturb_each_other(tmp_path):
    descriptor = {"kind": "text", "format": 1}
    writers = [TensorCache(tmp_path, descriptor, label="texts") for _ in range(2)]
    keys = np.arange(8, dtype=np.uint64).reshape(4, 2)
    values = {"embeds": torch.arange(12, dtype=torch.float32).reshape(4, 3)}
    assert [writer.load() for writer in writers] == [[], []]
    writers[0].write(keys[:3], {"embeds": values["embeds"][:3]})
    half_written = writers[0].folder / ".partial-0123456789ab-x.safetensors"
    half_written.write_bytes(b"x")
    writers[1].write(keys[1:], {"embeds": values["embeds"][1:]})
    for writer in writers:
        assert writer.load() == [], "what the other is writing is no damage"
        assert torch.equal(writer.read(writer.locate(keys))["embeds"], values["embeds"])
    assert half_written.exists(), "and is not removed"


@pytest.mark.slow
def test_runs_in_two_folders_may_share_a_cache_that_both_fill(tmp_path):
    short = {"max_train_steps": 3, "validation_step_interval": 0}
    execute(write_run(tmp_path, output="alone", **short))
    shutil.rmtree(tmp_path / "cache")
    configs = [write_run(tmp_path, output=name, **short) for name in ("a", "b")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "distill", "run", "--config", str(config)],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for config in configs
    ]  # fmt: skip
    for process in runs:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(tmp_path / "alone")
    verified = command("cache", "verify", "--config", str(configs[0]))
    assert verified.code == 0, verified.err
    assert not list((tmp_path / "cache").rglob(".partial-*"))
