"""Checkpoints are complete or absent, give back the same bits, and hold no pickle."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from distill.core.engine import checkpoint as module
from distill.core.engine.checkpoint import (
    CheckpointState,
    CheckpointStore,
    load_optimizer,
    optimizer_to_tensors,
    tensors_to_optimizer,
)
from distill.core.errors import UserError
from support.forks import forked

KILLER = Path(__file__).parent / "support" / "killed_saves.py"


def state(step: int, value: float = 1.0) -> CheckpointState:
    return CheckpointState(step, {"student": {"weight": torch.full((3, 5), value)}}, {"position": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "bf16": torch.randn(7).bfloat16(),
        "half": torch.randn(7).half(),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
        "count": torch.tensor(2**62),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "row": base[1],
        "tied": base,
        "strange": torch.tensor([float("nan"), float("inf"), -0.0]),
        "random_state": torch.get_rng_state(),
    }
    meta = {"loss": 0.1 + 0.2, "tiny": 5e-324, "names": ["a", None, True], "deep": {"rate": 1e-4}}
    store = CheckpointStore(tmp_path, limit=3)
    path = store.save(CheckpointState(7, {"student": tensors, "method": {}}, meta), step=7)
    loaded = store.load(path)
    assert loaded.step == 7
    assert loaded.meta == meta
    assert loaded.tensors["method"] == {}
    assert loaded.tensors["student"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        other = loaded.tensors["student"][name]
        assert other.dtype == tensor.dtype
        assert other.shape == tensor.shape
        assert (
            other.contiguous().view(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
        ), name


def test_latest_is_the_newest_complete_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, limit=5)
    assert store.latest() is None
    for step in (9, 10, 100):
        store.save(state(step), step=step)
    assert [path.name for path in store.all()] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    (tmp_path / "checkpoint-100" / "manifest.json").unlink()
    assert store.latest() == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "student.safetensors").write_bytes(b"short")
    assert store.latest() == tmp_path / "checkpoint-9"


def test_limit_keeps_the_newest_and_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, limit=2)
    for step in (1, 2, 3, 4):
        store.save(state(step), step=step)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    store.save(state(1), step=1)  # a run that went on from an older checkpoint
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    assert [path.name for path in store.discard_after(1)] == ["checkpoint-4"]
    assert names(tmp_path) == ["checkpoint-1"]


def test_no_limit_keeps_all(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, limit=0)
    for step in range(1, 8):
        store.save(state(step), step=step)
    assert len(store.all()) == 7


def test_same_step_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, limit=2)
    store.save(state(5, 1.0), step=5)
    store.save(state(5, 2.0), step=5)
    latest = store.latest()
    assert latest is not None
    assert store.load(latest).tensors["student"]["weight"].unique().item() == 2.0
    assert names(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize("file", ["student.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_is_found_and_the_file_named(tmp_path: Path, file: str) -> None:
    store = CheckpointStore(tmp_path, limit=2)
    store.save(state(1), step=1)
    path = store.save(state(2), step=2)
    data = bytearray((path / file).read_bytes())
    data[0 if file == "manifest.json" else -2] ^= 1
    (path / file).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(str(path / file))) as caught:
        store.load(path)
    assert "checkpoint-1" in str(caught.value)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no checkpoint"):
        CheckpointStore(tmp_path, limit=1).load(tmp_path)


def test_reading_ranks_change_nothing(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.partial").mkdir()
    store = CheckpointStore(tmp_path, limit=1, read_only=True)
    assert names(tmp_path) == [".checkpoint-3.partial"]
    with pytest.raises(ValueError, match="read-only"):
        store.save(state(1), step=1)


def test_nothing_is_written_by_pickle(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, limit=1).save(state(1), step=1)
    assert names(path) == ["manifest.json", "state.json", "student.safetensors"]
    for source in Path(module.__file__).parent.glob("*.py"):
        assert not re.search(r"import pickle|torch\.(save|load)\(", source.read_text()), source


def test_every_byte_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut needs: each file and the folder fsynced, then the rename, then the parent fsynced."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(handle: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def traced_rename(source: Path, target: Path) -> None:
        events.append(f"rename {Path(source).name} {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(module.os, "fsync", traced_fsync)
    monkeypatch.setattr(module.os, "rename", traced_rename)
    CheckpointStore(tmp_path, limit=1).save(state(1), step=1)
    assert events == [
        "sync state.json",
        "sync student.safetensors",
        "sync manifest.json.partial",
        "rename manifest.json.partial manifest.json",
        "sync .checkpoint-1.partial",
        "rename .checkpoint-1.partial checkpoint-1",
        f"sync {tmp_path.name}",
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("mode", "count"), [("random", 100), ("calls", 90)])
def test_killed_while_saving_latest_is_complete_and_loads(tmp_path: Path, mode: str, count: int) -> None:
    done = forked(KILLER, tmp_path, mode, count, processes=1)
    assert "child failed" not in done.stderr
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(verdicts) == count
    steps = []
    for verdict in verdicts:
        assert verdict["killed"], verdict
        assert verdict["right"] in (True, None), verdict
        assert all(re.fullmatch(r"checkpoint-\d+", name) for name in verdict["after"]), verdict
        assert verdict["seen"] is None or verdict["seen"] <= verdict["step"]
        steps.append(verdict["step"] or 0)
    assert steps == sorted(steps), "a checkpoint that had been complete was lost"
    assert sum(bool(verdict["leftovers"]) for verdict in verdicts) >= count // 10, "hardly a kill hit a save"
    assert steps[-1] > 5


# -- optimizers -------------------------------------------------------------------------------------------------------


def test_optimizer_state_survives_json_and_tensors_exactly() -> None:
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "kahan_comp": None, "factor": 1 / 3}, 1: {}},
        "param_groups": [
            {
                "betas": (0.9, 0.999),
                "lr": 1e-4,
                "max": float("inf"),
                "params": [0, 1],
                "fused": None,
                "step": torch.tensor(3, dtype=torch.int32),
            }
        ],
    }
    tensors, meta = optimizer_to_tensors(tree)
    assert set(tensors) == {"state.0.step", "param_groups.0.step"}
    back = tensors_to_optimizer(tensors, json.loads(json.dumps(meta, allow_nan=False)))
    assert back == tree
    assert type(back["param_groups"][0]["betas"]) is tuple
    assert list(back["state"]) == [0, 1]


def test_state_that_json_cannot_hold_is_refused_with_its_position() -> None:
    with pytest.raises(TypeError, match=r"state\.0\.closure is a function"):
        optimizer_to_tensors({"state": {0: {"closure": lambda: 0}}})


def test_float32_moments_of_bfloat16_weights_are_not_rounded() -> None:
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    first = torch.optim.AdamW([weight])
    saved = {"step": torch.tensor(1.0), "exp_avg": torch.ones(8).bfloat16(), "exp_avg_sq": torch.full((8,), 1 / 3)}
    state_dict = {"state": {0: saved}, "param_groups": first.state_dict()["param_groups"]}
    load_optimizer(first, state_dict)
    assert torch.equal(first.state[weight]["exp_avg_sq"], torch.full((8,), 1 / 3))
