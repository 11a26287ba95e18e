"""A disk that is full, or that only lets itself be read: said in a line, nothing lost, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from distill.core.engine import checkpoint
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore
from distill.core.engine.metrics import MetricsFile, read_metrics
from distill.core.engine.tracking import Trackers
from distill.core.errors import DistillError, UserError
from distill.core.plugin_api.tracker import RunInfo
from distill.core.runs.disk_plan import disk_plan
from distill.core.runs.run_log import RunLog
from distill.core.settings.run_settings import RunSettings
from distill.core.utils import disk
from distill.core.utils.disk import DiskFull, error_number, explained, is_disk_full
from distill.core.utils.memory import MemorySettings
from distill.plugins.tensorboard import TensorBoard
from safetensors.torch import save_file
from support.forks import ended
from support.quickstart import command
from support.small_run import execute, losses, write_run

Usage = namedtuple("Usage", "total used free")
QUIET = {"validation_step_interval": 0, "report_to": "none"}


@pytest.fixture
def free(monkeypatch):
    """What every disk says is free, in bytes, once it is set."""
    found: dict[str, int] = {}
    real = shutil.disk_usage
    monkeypatch.setattr(
        disk.shutil, "disk_usage", lambda path: Usage(0, 0, found["free"]) if found else real(path)
    )  # fmt: skip

    def set_free(num_bytes: int) -> None:
        found["free"] = num_bytes

    return set_free


def state(step: int, *, num_bytes: int = 400_000) -> CheckpointState:
    return CheckpointState(step, {"network": {"weight": torch.zeros(num_bytes // 4)}}, {})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_save_that_finds_the_disk_full_leaves_nothing_and_says_how_much_is_needed(tmp_path, monkeypatch, number):
    store = CheckpointStore(tmp_path, limit=3)
    store.save(state(1))

    def full(tensors, path):
        Path(path).write_bytes(b"x" * 1000)
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DiskFull, match=rf"{tmp_path}/checkpoint-2 cannot be written: .*\(0 MB needed\); .* are free"):
        store.save(state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert store.load(store.latest()).step == 1


def test_a_save_without_room_is_refused_before_anything_is_written(tmp_path, free):
    store = CheckpointStore(tmp_path, limit=3)
    store.save(state(1))
    free(10**6)
    with pytest.raises(DiskFull, match=r"there is no room for the next checkpoint \(4 MB needed\); 1 MB are free"):
        store.save(state(2, num_bytes=4_000_000))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_oldest_gives_way_first_where_there_is_no_room_for_both(tmp_path, monkeypatch, said):
    store = CheckpointStore(tmp_path, limit=2)
    store.save(state(1))
    store.save(state(2))
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint-1").iterdir())
    capacity = 2 * size + 100_000

    def free_bytes(path):
        return capacity - sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())

    monkeypatch.setattr(checkpoint, "free_bytes", free_bytes)
    store.save(state(3))
    assert [path.name for path in store.all()] == ["checkpoint-2", "checkpoint-3"]
    assert said == ["checkpoint-1 is removed before the next checkpoint is written: there is no room for both"]
    capacity = size + 100_000
    with pytest.raises(DiskFull):
        store.save(state(4, num_bytes=10**6))
    assert [path.name for path in store.all()] == ["checkpoint-2", "checkpoint-3"], "nothing was removed for nothing"


class FullAfter:
    """An unbuffered file whose disk takes so many bytes and no more."""

    def __init__(self, file, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._file.write(bytes(data[: self.room]))
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_metrics_that_found_no_room_are_whole_once_there_is(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append([(1, {"loss": 1.0})])
    metrics._file = FullAfter(metrics._file, 10)
    with pytest.raises(OSError, match="No space left"):
        metrics.append([(2, {"loss": 2.0})])
    assert [step for step, _ in read_metrics(metrics.path)] == [1]
    with pytest.raises(OSError, match="No space left"):
        metrics.sync()  # a checkpoint counts on these lines
    metrics._file.room = 10**6
    metrics.append([(3, {"loss": 3.0})])
    assert list(read_metrics(metrics.path)) == [(step, {"loss": float(step)}) for step in (1, 2, 3)]


def test_a_line_that_the_log_does_not_take_is_said_once_and_written_later(tmp_path, said):
    log = RunLog()
    log.open(tmp_path)
    log._file = FullAfter(log._file, 10)
    log.note("first")
    log.note("second")
    assert said == ["warning: run.log cannot be written, and goes on when it can: No space left on device"]
    log._file.room = 10**6
    log.note("third")
    log.close()
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines == ["run begins", "first", "second", "third"]


def test_a_tracker_that_finds_the_disk_full_is_one_line(tmp_path, monkeypatch, said, capfd):
    from tensorboard.summary.writer import record_writer

    trackers = Trackers([("tensorboard", TensorBoard(TensorBoard.Config()))])
    trackers.start(RunInfo(tmp_path, "project", "name", {}, {}, 0))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert len(said) == 1
    assert "tracker tensorboard failed in log() and is switched off, the run goes on: OSError: [Errno 28]" in said[0]
    assert "Traceback" not in capfd.readouterr().err


def test_what_the_system_says_is_found_in_every_library_s_error(tmp_path):
    by_rust = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert error_number(by_rust) == errno.ENOSPC
    outer = RuntimeError("x")
    outer.__cause__ = by_rust
    assert is_disk_full(outer)
    assert not is_disk_full(RuntimeError("out of memory"))
    assert explained(ValueError("x"), place=tmp_path) is None
    read_only = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "a"))
    assert isinstance(explained(read_only, place=tmp_path), UserError)
    assert explained(read_only, place=tmp_path, running=True).exit_code == 1
    assert explained(OSError(errno.ENAMETOOLONG, "File name too long"), place=tmp_path).exit_code == 2
    assert explained(by_rust, place=tmp_path).exit_code == 1


# -- before training --------------------------------------------------------------------------------------------------


def test_the_plan_of_a_full_sdxl_is_that_of_its_checkpoints():
    """Five full checkpoints of SDXL were 205 GB, five of a LoRA of rank 64 were 12 GB."""
    full = MemorySettings(2_567_000_000, 2_567_000_000, 128 * 128, averaged_parameters=2_567_000_000)
    plan = disk_plan(RunSettings(model_type="full", max_train_steps=5000), full)
    assert plan.num_checkpoints == 5
    assert plan.checkpoint_bytes * 5 == pytest.approx(205e9, rel=0.01)
    lora = MemorySettings(2_567_000_000, 197_000_000, 128 * 128)
    wide = RunSettings(max_train_steps=5000, export_dtype="float32")
    assert disk_plan(wide, lora).total == pytest.approx(12.6e9, rel=0.01)
    assert disk_plan(RunSettings(max_train_steps=5000), lora).student_bytes == 2 * 197_000_000, "bf16, as its passes"
    assert disk_plan(RunSettings(max_train_steps=900), lora).num_checkpoints == 2
    assert disk_plan(RunSettings(max_train_steps=900, checkpoint_step_interval=0), lora).num_checkpoints == 1


def test_a_run_that_will_not_fit_is_refused_before_anything_is_encoded(tmp_path, free):
    config = write_run(tmp_path, max_train_steps=100, checkpoint_step_interval=10, **QUIET)
    free(3_000_000)
    with pytest.raises(
        UserError, match=r"this run will write 4 MB \(5 checkpoints of 1 MB: 4 MB, student: 0 MB\)"
    ) as e:
        execute(config)
    assert "checkpoints_total_limit=3" in e.value.remedy
    assert not (tmp_path / "cache").exists()
    checked = command("config", "check", "--config", str(config))
    assert "this run will write 4 MB" in checked.out
    examined = command("doctor", "--config", str(config))
    assert "5 checkpoints of 1 MB" in examined.out
    assert ": too little" in examined.out


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_costs_no_step_that_was_saved(tmp_path, monkeypatch):
    short = {"max_train_steps": 6, "checkpoint_step_interval": 2, **QUIET}
    execute(write_run(tmp_path, output="whole", **short))
    config, real, saves = write_run(tmp_path, **short), save_file, []

    def full(tensors, path, *rest, **more):
        saves.append(path)
        if "checkpoint-2" not in str(path):  # the step after the one that finds it full, too
            Path(path).write_bytes(b"x" * 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensors, path, *rest, **more)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DistillError, match=r"checkpoint-4 cannot be written: the disk is full \(. MB needed\); ") as e:
        execute(config)
    assert e.value.exit_code == 1
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-2"]
    assert "could not be saved: there is no room for it" in (out / "run.log").read_text()
    assert f"To go on: distill run --config {out}/config.resolved.json" in (out / "run.log").read_text()
    monkeypatch.setattr("safetensors.torch.save_file", real)
    execute(config)
    assert losses(out) == losses(tmp_path / "whole")


LIMITED = """
import resource, sys
from distill.core.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
main(["run", "--config", sys.argv[1]])
"""


def test_a_limit_on_the_size_of_files_is_a_line_and_not_a_traceback(tmp_path):
    """What a quota or a small file system does, without the rights that mounting one needs."""
    config = write_run(tmp_path, max_train_steps=2, **QUIET)
    done = ended("-c", LIMITED, config, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "are free on the disk of" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]


@pytest.fixture
def mounted(tmp_path):
    """Mounts small file systems in memory; only root may."""
    mounts: list[Path] = []

    def mount(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("only root may mount a file system")
        mounts.append(place)
        return place

    yield mount
    for place in mounts:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a file system")
def test_a_disk_that_is_really_full_is_said_and_the_run_goes_on_afterwards(tmp_path, mounted):
    config = write_run(tmp_path, max_train_steps=6, checkpoint_step_interval=2, validation_step_interval=0)
    disk = mounted("small", "size=8m")
    values = {**json.loads(config.read_text()), "output_dir": "small/out"}
    config.write_text(json.dumps(values))
    execute(config)
    shutil.rmtree(disk / "out" / "checkpoint-6")
    shutil.rmtree(disk / "out" / "student")
    with (disk / "fill").open("wb", buffering=0) as fill:
        while fill.tell() < 8_000_000:
            try:
                fill.write(b"x" * 4096)
            except OSError:
                break
    done = command("run", "--config", str(config))
    assert done.code in (1, 2), done.err
    assert "No space left" in done.err or "there is no room" in done.err or "are free" in done.err
    assert not [path for path in disk.rglob("*") if ".partial" in path.name]
    (disk / "fill").unlink()
    assert execute(config)[0].steps == 6
    assert [step for step, *_ in losses(disk / "out")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a file system")
@pytest.mark.parametrize(("key", "name"), [("output_dir", "output_dir"), ("cache", r"data\.noise\.cache_dir_vae")])
def test_a_read_only_folder_is_named_before_anything_is_loaded(tmp_path, mounted, key, name):
    config = write_run(tmp_path, max_train_steps=2, **QUIET)
    place = mounted("fixed", "size=1m,ro")
    shutil.rmtree(tmp_path / "model" / "unet")  # loading would say something else
    overrides = {"output_dir": str(place)} if key == "output_dir" else {}
    if key == "cache":
        data = json.loads((tmp_path / "multidatabackend.json").read_text())
        data[0]["cache_dir_vae"] = str(place)
        (tmp_path / "multidatabackend.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"^{name} = {place} cannot be written to: Read-only file system") as e:
        execute(config, **overrides)
    assert e.value.exit_code == 2


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR])
def test_a_folder_that_refuses_files_is_named_by_its_key(tmp_path, monkeypatch, number):
    config = write_run(tmp_path, max_train_steps=2, **QUIET)

    def refuse(self, data):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=rf"^output_dir = {tmp_path}/out cannot be written to: {os.strerror(number)}"):
        execute(config)


# -- checkpoints that are passed over ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    write_run(root)
    execute(write_run(root, model=root / "model", max_train_steps=4, checkpoint_step_interval=2, **QUIET))
    return root


@pytest.fixture
def left(finished, tmp_path):
    """A copy of a run that has two checkpoints and no student; its config and its folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out" / "student")
    settings = {"max_train_steps": 4, "checkpoint_step_interval": 2, **QUIET}
    return write_run(tmp_path, model=finished / "model", **settings), tmp_path / "out"


def truncate(folder: Path) -> str:
    file = folder / "network-student.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:100])
    return f"network-student.safetensors has 100 bytes instead of {size}"


def test_a_checkpoint_that_is_passed_over_is_named_with_the_reason(left, finished):
    config, out = left
    reason = truncate(out / "checkpoint-4")
    _, lines = execute(config)
    assert f"warning: checkpoint-4 is passed over: {reason}" in lines
    assert any(line.startswith("resumed from") and "checkpoint-2 at step 2" in line for line in lines)
    assert losses(out) == losses(finished / "out")


def test_with_only_such_ones_the_run_is_refused_and_nothing_changes(left):
    config, out = left
    reason = truncate(out / "checkpoint-4")
    (out / "checkpoint-2" / "manifest.json").unlink()
    metrics = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as e:
        execute(config)
    assert f"(checkpoint-2: it has no manifest.json; checkpoint-4: {reason})" in e.value.message
    assert "--overwrite" in e.value.remedy
    assert (out / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {"x": 3}}', "{}"])
def test_a_damaged_manifest_is_a_reason(tmp_path, content):
    store = CheckpointStore(tmp_path, limit=None)
    store.save(state(1))
    (tmp_path / "checkpoint-1" / "manifest.json").write_text(content)
    if "x" in content:
        (tmp_path / "checkpoint-1" / "x").write_text("")
    assert store.passed_over() == [(tmp_path / "checkpoint-1", "its manifest.json is damaged")]
    assert store.latest() is None
