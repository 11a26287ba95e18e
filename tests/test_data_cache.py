"""The tensor cache: whole or absent, checked, resumable."""

import json
import os
import resource

import numpy as np
import pytest
import torch
from distill.core.data.cache.tensor_cache import TensorCache, cache_folders, remove_cache
from distill.core.errors import DistillError

DESCRIPTOR = {"kind": "latents", "vae": "x"}


def open_cache(folder, **descriptor) -> TensorCache:
    cache = TensorCache(folder, DESCRIPTOR | descriptor, label="test cache")
    cache.load()
    return cache


def keys(*numbers: int) -> np.ndarray:
    return np.array([[number, number * 7 + 1] for number in numbers], dtype=np.uint64).reshape(-1, 2)


def entries(*numbers: int, shape=(2, 3), dtype=torch.float32):
    return {
        "a": torch.stack([torch.full(shape, float(n), dtype=dtype) for n in numbers]),
        "b": torch.tensor(numbers, dtype=torch.int64),
    }


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def rewrite(path, place: int, *, keep_time: bool) -> None:
    status, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns if keep_time else status.st_mtime_ns + 10**9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_written_entry_is_read_back(tmp_path, dtype):
    cache = open_cache(tmp_path)
    cache.write(keys(1, 2, 3), entries(1, 2, 3, dtype=dtype))
    cache.write(keys(9), entries(9, shape=(4, 1), dtype=dtype))
    again = open_cache(tmp_path)
    assert len(again) == 4
    found = again.locate(keys(3, 9, 5, 1))
    assert (found >= 0).tolist() == [True, True, False, True]
    read = again.read(found[[0, 3, 0]])
    assert read["a"].dtype == dtype
    assert read["a"][:, 0, 0].tolist() == [3, 1, 3]
    assert read["b"].tolist() == [3, 1, 3]
    assert again.read(found[[1]])["a"].shape == (1, 4, 1)
    assert shards(tmp_path)[0].read_bytes()[8:9] == b"{"  # plain safetensors


def test_other_descriptors_give_other_caches(tmp_path):
    open_cache(tmp_path).write(keys(1), entries(1))
    assert len(open_cache(tmp_path)) == 1
    assert len(open_cache(tmp_path, vae="y")) == 0
    assert [descriptor for _, descriptor in cache_folders(tmp_path)] == [DESCRIPTOR]


def test_an_interrupted_write_leaves_no_entry(tmp_path):
    cache = open_cache(tmp_path)
    cache.write(keys(1), entries(1))
    cache.write(keys(2), entries(2))
    manifest = next(cache.folder.glob("*.jsonl"))
    manifest.write_bytes(manifest.read_bytes()[:-20])  # killed while the last line was written
    (cache.folder / ".partial-1-x.safetensors").write_bytes(b"half")
    again = open_cache(tmp_path)
    assert (again.locate(keys(1, 2)) >= 0).tolist() == [True, False]
    again.write(keys(2), entries(2))
    assert (open_cache(tmp_path).locate(keys(1, 2)) >= 0).all()


def test_only_old_partial_files_are_removed(tmp_path):
    cache = open_cache(tmp_path)
    cache.write(keys(1), entries(1))
    old, young = cache.folder / ".partial-1-x", cache.folder / "orphan.safetensors"
    old.write_bytes(b"half")
    young.write_bytes(b"of a running writer")
    os.utime(old, (0, 0))
    open_cache(tmp_path)
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("damage", ["data", "cut", "gone", "header"])
def test_damaged_shards_are_dropped_at_start(tmp_path, damage, said):
    cache = open_cache(tmp_path)
    cache.write(keys(1, 2), entries(1, 2))
    cache.write(keys(3), entries(3))
    shard = cache.folder / sorted(path.name for path in cache.folder.glob("*.safetensors"))[0]
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        rewrite(shard, 12 if damage == "header" else -9, keep_time=False)
    again = open_cache(tmp_path)
    assert (again.locate(keys(1, 2, 3)) >= 0).tolist() == [False, False, True]
    assert len(said) == 1
    assert shard.name in said[0]
    assert open_cache(tmp_path) is not None
    assert len(said) == 1  # said once


def test_damage_without_a_changed_modification_time_is_found_when_read(tmp_path):
    cache = open_cache(tmp_path)
    cache.write(keys(1, 2), entries(1, 2))
    data = shards(tmp_path)[0].read_bytes()
    place = data.rindex(np.float32(2.0).tobytes() * 6)  # inside the second entry
    rewrite(shards(tmp_path)[0], place + 2, keep_time=True)
    again = open_cache(tmp_path)
    assert again.read(again.locate(keys(1)))["b"].tolist() == [1]
    with pytest.raises(DistillError, match="damaged while the run was using it"):
        again.read(again.locate(keys(2)))
    assert len(open_cache(tmp_path)) == 0  # so that the next build makes it anew
    cache = open_cache(tmp_path)
    cache.write(keys(1, 2), entries(1, 2))
    rewrite(shards(tmp_path)[0], -9, keep_time=True)
    assert open_cache(tmp_path).load(thorough=True)


def test_a_copied_cache_is_hashed_once(tmp_path, monkeypatch):
    open_cache(tmp_path).write(keys(1), entries(1))
    os.utime(shards(tmp_path)[0], ns=(5, 5))
    assert len(open_cache(tmp_path)) == 1
    from distill.core.data.cache import tensor_cache as module

    monkeypatch.setattr(module, "sha256", None)
    assert len(open_cache(tmp_path)) == 1


def test_failures_are_remembered_with_their_shard(tmp_path):
    from distill.core.data.cache.tensor_cache import Failure

    cache = open_cache(tmp_path)
    cache.write(keys(1), entries(1), [Failure(keys(2)[0].tobytes().hex(), "b.png", "truncated")])
    cache.write(keys(), {}, [Failure(keys(3)[0].tobytes().hex(), "c.png", "no image")])
    again = open_cache(tmp_path)
    assert again.failed(keys(1, 2, 3)).tolist() == [False, True, True]
    assert again.failure(keys(3)[0]).reason == "no image"


def test_two_writers_do_not_interfere(tmp_path):
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    for number in range(3):
        first.write(keys(number), entries(number))
        second.write(keys(number, 10 + number), entries(number, 10 + number))
    merged = open_cache(tmp_path)
    assert (merged.locate(keys(0, 1, 2, 10, 11, 12)) >= 0).all()


def test_the_number_of_open_files_is_bounded(tmp_path):
    cache = open_cache(tmp_path)
    for number in range(30):
        cache.write(keys(number), entries(number))
    again = open_cache(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    again.read(again.locate(keys(*range(30))))
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after - before < 5
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0


def test_clearing_removes_only_the_caches_own_files(tmp_path):
    cache = open_cache(tmp_path)
    cache.write(keys(1), entries(1))
    (tmp_path / "precious.txt").write_text("mine")
    (cache.folder / "precious.txt").write_text("mine")
    assert remove_cache(cache.folder) > 0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["precious.txt", "precious.txt"]
    manifest = {"kind": "other"}
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "descriptor.json").write_text(json.dumps(manifest))
    assert list(cache_folders(tmp_path)) == []
