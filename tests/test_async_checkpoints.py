"""Checkpoints that are written while training goes on: what is written is the state that was saved, or an error."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from distill.core.engine import async_checkpoints, checkpoint
from distill.core.engine.async_checkpoints import BackgroundSaves, StagingBuffer
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore
from distill.core.errors import DistillError
from distill.core.utils.disk import DiskFull
from support.forks import forked
from support.small_run import execute, losses, write_run

QUIET = {"validation_step_interval": 0, "report_to": "none", "evaluation_num_samples": 0}


def state(step: int) -> CheckpointState:
    tensors = {
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "half": torch.linspace(0, 1, 7).bfloat16(),
        "eighth": torch.linspace(0, 1, 5).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "view": torch.arange(100)[10:20],
    }
    return CheckpointState(step, {"network": tensors, "optimizer": {"scalar": torch.tensor(step)}}, {"step": step})


def equal(one: CheckpointState, two: CheckpointState) -> bool:
    return (one.step, one.meta) == (two.step, two.meta) and all(
        torch.equal(tensor.float(), two.tensors[group][name].float()) and tensor.dtype == two.tensors[group][name].dtype
        for group, tensors in one.tensors.items()
        for name, tensor in tensors.items()
    )


@pytest.fixture
def held(monkeypatch):
    """Holds every write of a checkpoint until it is let go."""
    event, real = threading.Event(), checkpoint._write

    def write(folder, saved):
        assert event.wait(60)
        real(folder, saved)

    monkeypatch.setattr(checkpoint, "_write", write)
    return event


def test_what_is_written_is_what_was_saved_whatever_changes_meanwhile(tmp_path, held):
    store = CheckpointStore(tmp_path, limit=None)
    saves, live = BackgroundSaves(store), state(1)
    saves.begin(live)
    for tensors in live.tensors.values():
        for tensor in tensors.values():
            tensor.zero_()
    assert not saves.ended
    assert store.latest() is None, "a checkpoint is complete or absent"
    held.set()
    saves.finish()
    assert saves.ended
    assert equal(store.load(store.latest()), state(1))


def test_what_steps_alone_change_is_copied_while_the_next_step_makes_its_gradients(tmp_path, monkeypatch):
    """Weights may change once wait_copied returns; all else (buffers, a method's state) as soon as begin does."""
    live, real, copying = state(1), async_checkpoints._copy, threading.Event()

    def copy(pairs, ready):
        if threading.current_thread() is not threading.main_thread():
            assert copying.wait(60)
        real(pairs, ready)

    monkeypatch.setattr(async_checkpoints, "_copy", copy)
    store = CheckpointStore(tmp_path, limit=None)
    saves = BackgroundSaves(store)
    saves.begin(live, stepped=lambda group, name: name == "transposed")
    live.tensors["network"]["half"].zero_()
    live.meta["step"] = 7
    changed = threading.Thread(target=lambda: (saves.wait_copied(), live.tensors["network"]["transposed"].zero_()))
    changed.start()
    changed.join(0.2)
    assert changed.is_alive(), "the copy is not made, so nothing may change"
    copying.set()
    changed.join()
    saves.finish()
    assert equal(store.load(store.latest()), state(1))


def test_the_copy_s_memory_serves_every_save_and_grows_with_the_state():
    buffer = StagingBuffer()
    first, second = buffer.reserve(state(1)), buffer.reserve(state(2))
    addresses = [
        {name: t.data_ptr() for group in each.tensors.values() for name, t in group.items() if t.numel()}
        for each in (first, second)
    ]
    assert addresses[0] == addresses[1]
    assert len(set(addresses[0].values())) == len(addresses[0])
    grown = state(3)
    grown.tensors["more"] = {"weight": torch.randn(1000, 1000)}
    assert buffer.reserve(grown).tensors["more"]["weight"].untyped_storage().nbytes() == 4_000_000


def test_a_write_that_fails_is_raised_where_it_is_waited_for(tmp_path, monkeypatch):
    saves = BackgroundSaves(CheckpointStore(tmp_path, limit=None))

    def full(folder, saved):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        saves.begin(state(1))
        with pytest.raises(DiskFull, match="checkpoint-1 cannot be written: the disk is full"):
            saves.finish()
    saves.begin(state(2))
    saves.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_without_room_for_a_copy_training_waits_and_is_told_why(tmp_path, monkeypatch, said):
    monkeypatch.setattr(async_checkpoints, "free_memory_bytes", lambda: 2**30)
    store = CheckpointStore(tmp_path, limit=None)
    saves = BackgroundSaves(store)
    saves.begin(state(1))
    assert saves.ended
    assert equal(store.load(store.latest()), state(1))
    assert said == [
        "checkpoint-1 is written while training waits: a copy of it takes 0 MB of memory, and 1.1 GB are free"
    ]


def test_a_run_goes_on_while_it_saves_and_has_the_same_files(tmp_path, monkeypatch):
    """Each write takes as long as three steps; plugins hear of a checkpoint when it is complete, and not before."""
    plugin = tmp_path / "observer.py"
    plugin.write_text(
        "import distill\n"
        "heard = []\n"
        "@distill.hookimpl\n"
        "def on_step_end(state, step):\n"
        "    heard.append(('step', step))\n"
        "@distill.hookimpl\n"
        "def on_checkpoint_saved(state, folder, step):\n"
        "    assert (folder / 'manifest.json').is_file() and folder.name == f'checkpoint-{step}'\n"
        "    heard.append(('saved', step))\n"
        "    (state.output_dir / 'heard.txt').write_text(repr(heard))\n"
    )
    short = {"max_train_steps": 8, "checkpoint_step_interval": 4, "use_ema": True, **QUIET}
    execute(write_run(tmp_path, output="waiting", checkpoint_async=False, **short), plugins=[plugin])
    config, real, steps = write_run(tmp_path, output="going-on", **short), checkpoint._write, threading.Semaphore(0)

    def slow(folder, saved):
        real(folder, saved)
        if saved.step == 4:
            for _ in range(3):
                assert steps.acquire(timeout=60)

    from distill.core.engine.loop import Loop

    taken = Loop.step
    monkeypatch.setattr(checkpoint, "_write", slow)
    monkeypatch.setattr(Loop, "step", lambda *args: (taken(*args), args[1] >= 4 and steps.release())[0])
    execute(config, plugins=[plugin])
    order = [eval((tmp_path / output / "heard.txt").read_text()) for output in ("waiting", "going-on")]
    assert [heard for heard in order[0] if heard[0] == "saved"] == [("saved", 4), ("saved", 8)]
    assert order[0].index(("saved", 4)) == order[0].index(("step", 4)) + 1
    assert order[1].index(("saved", 4)) > order[1].index(("step", 6)), "training went on"
    assert order[1][-1] == ("saved", 8)
    assert losses(tmp_path / "waiting") == losses(tmp_path / "going-on")
    for file in sorted((tmp_path / "waiting").glob("checkpoint-*/*.safetensors")):
        other = tmp_path / "going-on" / file.relative_to(tmp_path / "waiting")
        assert file.read_bytes() == other.read_bytes(), file


def test_a_write_that_fails_while_training_goes_on_ends_the_run_within_a_step(tmp_path, monkeypatch):
    config, real = write_run(tmp_path, max_train_steps=1000, checkpoint_step_interval=2, **QUIET), checkpoint._write

    def damaged(folder: Path, saved: CheckpointState):
        if saved.step == 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        real(folder, saved)

    monkeypatch.setattr(checkpoint, "_write", damaged)
    with pytest.raises((DistillError, OSError), match="Input/output error"):
        execute(config)
    found = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert found in (["checkpoint-2", "checkpoint-5"], ["checkpoint-2", "checkpoint-6"]), "the step it ended at is kept"
    assert "To go on: distill run" in (tmp_path / "out" / "run.log").read_text()


# -- of several processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two processes saw that saved sharded tensors, one after the other in several ways."""
    from support import sharded_saves

    folder = tmp_path_factory.mktemp("sharded")
    forked(sharded_saves.__file__, folder, processes=1, timeout=300)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


def test_parts_are_written_as_they_were_saved_while_each_process_goes_on(seen):
    for rank in (0, 1):
        assert seen[rank]["ended before it was written"] is False
        assert seen[rank]["before"] == [], "a checkpoint is complete or absent"
        assert seen[rank]["complete where it returns"]
        assert seen[rank]["right"]


def test_a_process_that_cannot_write_its_parts_is_named_by_all_and_leaves_nothing(seen):
    for rank in (0, 1):
        assert "checkpoint-2 cannot be written: the disk is full" in seen[rank]["one cannot write"]
        assert seen[rank]["left by it"] == ["checkpoint-1"]
    assert seen[0]["the first has no room"] == "MemoryError: no room at all"
    assert seen[1]["the first has no room"] == "DistillError: process 0 failed: MemoryError: no room at all"


def test_copies_of_a_part_are_written_once(seen):
    assert [found["copies are right"] for found in seen] == [True, True]
    assert seen[0]["files of copies"] == 2


def test_a_process_that_dies_in_a_save_ends_it_and_leaves_the_checkpoints_before(seen):
    assert "process 1 (pid" in seen[0]["one is killed"]
    assert "gone without a word" in seen[0]["one is killed"]
    assert seen[0]["left in the end"] == ["checkpoint-1", "checkpoint-4"]


def test_a_part_that_is_offloaded_stays_where_it_is(tmp_path):
    """The mesh of offloaded weights is of the card: a part moved there would be a copy that nobody trains or saves."""
    import torch.distributed as dist
    from distill.core.engine.shards import part_of, sharded_as
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("meta", (1,))
        like = DTensor.from_local(torch.empty(4, 2, device="meta"), mesh, [Shard(0)])
        part = torch.zeros(4, 2, dtype=torch.bfloat16)
        sharded = sharded_as(part, like)
        assert part_of(sharded).data_ptr() == part.data_ptr()
        assert (sharded.dtype, sharded.shape) == (torch.bfloat16, like.shape)
    finally:
        dist.destroy_process_group()
