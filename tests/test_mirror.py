"""Caches and checkpoints in another place: filled from there, pushed there, whole there at every moment."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distill.core.data.loader import BatchLayout
from distill.core.data.pipeline import DataPipeline
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore
from distill.core.engine.remote_checkpoints import MirroredStore, RemoteCheckpoints
from distill.core.errors import OutOfReach, UserError
from distill.data_backends.local import LocalBackend
from distill.data_backends.s3 import S3Backend
from support.data_helpers import REGISTRY, FakeFamily, entry, fill, take
from support.faulty_proxy import Fault, FaultyProxy
from support.s3_server import s3, s3_server  # noqa: F401
from test_data_pipeline import MIXED, by_position
from test_data_s3 import remote


@pytest.fixture
def bucket(s3):  # noqa: F811
    return s3.bucket("data")


def paths(s3, endpoint=""):  # noqa: F811
    """Entries for embeddings and latents in the bucket."""
    return [
        remote(s3, "texts", "texts", dataset_type="text_embeds", endpoint=endpoint, default=True, write_batch_size=3),
        remote(s3, "latents", "latents", dataset_type="vae_embeds", endpoint=endpoint),
    ]


def machine(root: Path, images: Path, caches, *, family=None):
    """A pipeline on a machine with nothing but the images, whose caches are elsewhere."""
    own = entry(images, cache_dir_vae=None, write_batch_size=2)
    run = SimpleNamespace(num_workers=2, dataloader_prefetch=2)
    config = SimpleNamespace(run=run, datasets=[own], caches=caches, text_cache=caches[0])
    return DataPipeline(
        config, REGISTRY, family or FakeFamily(), layout=BatchLayout(2, 1), seed=1,
        cache_root=root / "cache",
    )  # fmt: skip


def check_whole(s3, bucket: str) -> int:  # noqa: F811
    """Every manifest in the bucket names shards that are there, with the right bytes; returns how many."""
    from hashlib import sha256

    count = 0
    for key in s3.objects(bucket):
        if key.endswith(".jsonl"):
            for line in s3.get(bucket, key).splitlines():
                record = json.loads(line)
                if "shard" in record:
                    data = s3.get(bucket, f"{key.rpartition('/')[0]}/{record['shard']['file']}")
                    assert sha256(data).hexdigest() == record["shard"]["sha256"]
                    count += 1
    return count


def test_a_second_machine_encodes_nothing(tmp_path, s3, bucket, said):  # noqa: F811
    images = fill(tmp_path / "set", MIXED)
    first = FakeFamily()
    batches = take(machine(tmp_path / "1", images, paths(s3), family=first), 8)
    assert first.num_images == 10
    assert check_whole(s3, bucket) >= 8
    second = FakeFamily()
    again = machine(tmp_path / "2", images, paths(s3), family=second)
    assert by_position([take(again, 8)]) == by_position([batches])
    assert second.num_images == len(second.prompts) == 0
    shards = sorted((tmp_path / "2").rglob("*.safetensors"))
    shards[0].write_bytes(b"damaged")
    shards[1].unlink()
    third = FakeFamily()
    machine(tmp_path / "2", images, paths(s3), family=third).prepare()
    assert third.num_images == len(third.prompts) == 0, "what is damaged here is fetched again"


@pytest.mark.parametrize("num_put", [0, 1, 2, 3, 5, 8, 11])
def test_what_a_dead_server_left_undone_is_done_by_the_next_start(tmp_path, s3, bucket, num_put):  # noqa: F811
    """The server goes for good after some writes, as it does for a process that is killed there."""
    images = fill(tmp_path / "set", MIXED)
    with FaultyProxy(s3.port) as proxy:
        proxy.fault(Fault("none"), match="PUT", times=num_put)
        proxy.fault(Fault("drop"), match="PUT", times=10_000)
        with pytest.raises(OutOfReach) as caught:
            machine(tmp_path / "1", images, paths(s3, proxy.endpoint)).prepare()
        assert caught.value.exit_code == 1
        check_whole(s3, bucket)
        proxy.clear()
        family = FakeFamily()
        finished = machine(tmp_path / "1", images, paths(s3, proxy.endpoint), family=family)
        finished.prepare()
        assert family.num_images + len(family.prompts) < 20
    elsewhere = FakeFamily()
    machine(tmp_path / "2", images, paths(s3), family=elsewhere).prepare()
    assert elsewhere.num_images == len(elsewhere.prompts) == 0
    check_whole(s3, bucket)


def test_manifests_stay_short(tmp_path, s3, bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr("distill.core.data.cache.tensor_cache.SHARDS_PER_MANIFEST", 2)
    images = fill(tmp_path / "set", MIXED)
    machine(tmp_path / "1", images, paths(s3)).prepare()
    manifests = [key for key in s3.objects(bucket) if key.endswith(".jsonl")]
    assert max(len(s3.get(bucket, key).splitlines()) for key in manifests) == 2
    family = FakeFamily()
    machine(tmp_path / "2", images, paths(s3), family=family).prepare()
    assert family.num_images == len(family.prompts) == 0


def test_a_place_that_may_not_be_written_is_an_error_with_its_name(tmp_path, s3, bucket, said):  # noqa: F811
    images = fill(tmp_path / "set", MIXED)
    with FaultyProxy(s3.port) as proxy:
        proxy.fault(Fault("status", status=403, code="AccessDenied"), match="PUT", times=99)
        with pytest.raises(UserError, match="data.texts: s3://data/texts/ cannot be written: access is refused"):
            machine(tmp_path / "1", images, paths(s3, proxy.endpoint)).prepare()


def test_any_backend_serves(tmp_path):
    class Elsewhere(LocalBackend):
        on_this_machine = False

    registry = SimpleNamespace(get=lambda kind, name: {"local": LocalBackend, "other": Elsewhere}[name])
    (tmp_path / "there").mkdir()
    images = fill(tmp_path / "set", MIXED)
    texts = entry(tmp_path / "there", id="texts", type="other", dataset_type="text_embeds", cache_dir_vae=None)
    for number in (1, 2):
        family = FakeFamily()
        data = machine(tmp_path / str(number), images, [texts], family=family)
        data._registry = data._paths._registry = registry
        data.prepare()
        assert bool(family.prompts) == (number == 1)
    assert list((tmp_path / "there").rglob("*.safetensors"))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def state(step: int) -> CheckpointState:
    return CheckpointState(step, {"student": {"weight": torch.full((3, 5), float(step))}}, {"position": step})


def store(s3, folder: Path, *, endpoint: str = "", limit: int | None = 2) -> MirroredStore:  # noqa: F811
    backend = S3Backend(remote(s3, "checkpoints", "run", endpoint=endpoint).backend)
    there = RemoteCheckpoints("checkpoints", backend, limit=limit)
    return MirroredStore(folder, limit=limit, remote=there)


def test_checkpoints_go_there_and_come_back(tmp_path, s3, bucket, said):  # noqa: F811
    here = store(s3, tmp_path / "1")
    for step in (1, 2, 3):
        here.save(state(step))
    here.wait()
    assert {key.split("/")[1] for key in s3.objects(bucket)} == {"checkpoint-2", "checkpoint-3"}
    other = store(s3, tmp_path / "2")
    other.download()
    path = other.latest()
    assert path is not None
    assert path.name == "checkpoint-3"
    assert torch.equal(other.load(path).tensors["student"]["weight"], torch.full((3, 5), 3.0))
    other.save(state(4))
    other.wait()
    here.download()
    assert [path.name for path in here.all()][-1] == "checkpoint-4"
    assert here.discard_after(3) == [tmp_path / "1" / "checkpoint-4"]
    assert "run/checkpoint-4/manifest.json" not in s3.objects(bucket)
    with pytest.raises(UserError, match="holds checkpoints of a run, up to step 3"):
        here._remote.begin_afresh(overwrite=False)
    here._remote.begin_afresh(overwrite=True)
    assert s3.objects(bucket) == []


def test_a_checkpoint_that_is_named_comes_back_too(tmp_path, s3, bucket, said):  # noqa: F811
    here = store(s3, tmp_path / "1", limit=None)
    for step in (1, 2, 3):
        here.save(state(step))
    here.wait()
    other = store(s3, tmp_path / "2", limit=None)
    other.download(7)
    assert other.all() == []
    other.download(2)
    assert [path.name for path in other.all()] == ["checkpoint-2"]
    assert torch.equal(other.load(other.all()[0]).tensors["student"]["weight"], torch.full((3, 5), 2.0))
    other.download(2)
    assert sum("fetching checkpoint-2" in line for line in said) == 1
    assert other.discard_after(2) == []
    assert "later checkpoints are removed from s3://data/run/: checkpoint-3" in said[-1]
    assert {key.split("/")[1] for key in s3.objects(bucket)} == {"checkpoint-1", "checkpoint-2"}


def test_an_upload_that_fails_is_tried_again_and_loses_nothing(tmp_path, s3, bucket, said):  # noqa: F811
    with FaultyProxy(s3.port) as proxy:
        here = store(s3, tmp_path / "1", endpoint=proxy.endpoint, limit=None)
        proxy.fault(Fault("drop"), match="PUT .*(manifest|state)", times=3)
        here.save(state(1))
        here.save(state(2))
        here.wait()
        assert any("checkpoint-1 is complete here but could not be copied" in line for line in said)
        assert RemoteCheckpoints("x", here._remote.backend, limit=None).steps() == [1, 2]
        proxy.fault(Fault("status", status=403), match="PUT", times=99)
        here.save(state(3))
        here.wait()
    assert "not copied to s3://data/run/: checkpoint-3" in said[-1]
    assert CheckpointStore(tmp_path / "1", limit=None).load(tmp_path / "1" / "checkpoint-3").step == 3


def test_a_slow_place_does_not_hold_training_up(tmp_path, s3, bucket, said):  # noqa: F811
    with FaultyProxy(s3.port) as proxy:
        here = store(s3, tmp_path / "1", endpoint=proxy.endpoint, limit=1)
        proxy.fault(Fault("slow", seconds=2), match="PUT .*checkpoint-1/", times=1)
        started = time.monotonic()
        for step in (1, 2, 3):
            here.save(state(step))
        assert time.monotonic() - started < 1.5
        assert [path.name for path in here.all()] == ["checkpoint-1", "checkpoint-3"], "the one under way stays"
        here.wait()
    assert [path.name for path in here.all()] == ["checkpoint-3"]
    assert here._remote.steps() == [3]
    assert not any("warning" in line for line in said)


def test_a_half_there_is_none(tmp_path, s3, bucket, said):  # noqa: F811
    here = store(s3, tmp_path / "1")
    here.save(state(1))
    here.save(state(2))
    here.wait()
    s3.client.delete_object(Bucket=bucket, Key="run/checkpoint-2/manifest.json")
    other = store(s3, tmp_path / "2")
    other.download()
    assert [path.name for path in other.all()] == ["checkpoint-1"]
    s3.put(bucket, "run/checkpoint-1/student.safetensors", b"damaged")
    shutil.rmtree(tmp_path / "2")
    with pytest.raises(UserError, match="is not what was written"):
        store(s3, tmp_path / "2").download()
    assert CheckpointStore(tmp_path / "2", limit=None).all() == []
