"""A whole run whose images, caches and checkpoints are in a bucket that goes away and comes back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distill.core.errors import OutOfReach, UserError
from safetensors.torch import load_file
from support.faulty_proxy import Fault, FaultyProxy
from support.s3_server import S3Server, s3, s3_server  # noqa: F401
from support.small_run import execute, losses, write_images, write_run
from support.torchrun import launched
from test_mirror import check_whole

pytestmark = pytest.mark.slow
PARTS = {"texts": "text_embeds", "latents": "vae_embeds", "checkpoints": "checkpoints"}


def configure(
    root: Path, output: str, server: S3Server, endpoint: str, prefix: str, *, patience: int = 3, timeout: float = 10
) -> Path:
    """The small run with everything in the bucket, under a prefix of its own."""
    file = write_run(root, output=output, max_train_steps=6, checkpoint_step_interval=2, validation_step_interval=0)
    reach = {
        **server.keys("data", aws_max_attempts=patience, aws_timeout_seconds=timeout),
        "aws_endpoint_url": endpoint,
    }
    data = [{"id": "noise", **reach, "aws_data_prefix": "images"}]
    data += [
        {"id": id, "dataset_type": kind, **reach, "aws_data_prefix": f"{prefix}/{id}", "write_batch_size": 4}
        for id, kind in PARTS.items()
    ]
    (root / "multidatabackend.json").write_text(json.dumps(data))
    return file


def same_student(one: Path, other: Path) -> bool:
    files = sorted((one / "student").rglob("*.safetensors"))
    pairs = [(load_file(file), load_file(other / file.relative_to(one))) for file in files]
    return bool(files) and all(torch.equal(b[name], tensor) for a, b in pairs for name, tensor in a.items())


def test_a_bucket_that_goes_away_at_any_time_changes_nothing(tmp_path, s3, capsys):  # noqa: F811
    bucket = s3.bucket("data")
    s3.fill(bucket, "images", write_images(tmp_path / "images"))
    with FaultyProxy(s3.port) as proxy:
        execute(configure(tmp_path, "whole", s3, proxy.endpoint, "whole"))

        # while the index is read, then while caches are pushed: the run ends, and goes on where it was
        for match in ("GET .*png", "PUT .*latents"):
            proxy.fault(Fault("none"), match=match, times=2)
            proxy.fault(Fault("drop"), match=match, times=10_000)
            with pytest.raises(OutOfReach) as caught:
                execute(configure(tmp_path, "cut", s3, proxy.endpoint, "cut"))
            assert caught.value.exit_code == 1
            assert "resume_from_checkpoint=latest" in str(caught.value)
            proxy.clear()
            check_whole(s3, bucket)

        # while training: the run goes on without its copies and says so; the last one is made up for at the end
        proxy.fault(Fault("status", status=503), match="PUT .*checkpoint-2/", times=3)
        execute(configure(tmp_path, "cut", s3, proxy.endpoint, "cut"))
        assert "checkpoint-2 is complete here but could not be copied" in capsys.readouterr().err
        assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
        assert same_student(tmp_path / "whole", tmp_path / "cut")
        keys = s3.objects(bucket, "cut/checkpoints/")
        assert {f"cut/checkpoints/checkpoint-{step}/manifest.json" for step in (2, 4, 6)} <= set(keys)

        # short faults of every kind, spread over a whole run: nothing is noticed
        for fault in (Fault("drop"), Fault("status", status=503, headers={"Retry-After": "0"}), Fault("truncate"),
                      Fault("shorten")):  # fmt: skip
            proxy.fault(Fault("none"), times=5)
            proxy.fault(fault, match="GET|PUT", times=2)
        execute(configure(tmp_path, "faulty", s3, proxy.endpoint, "faulty", patience=8))
        assert losses(tmp_path / "faulty") == losses(tmp_path / "whole")

    # this machine is gone: another one goes on from the bucket, and encodes nothing
    s3.client.delete_object(Bucket=bucket, Key="cut/checkpoints/checkpoint-6/manifest.json")
    shutil.rmtree(tmp_path / "cut")
    _, lines = execute(configure(tmp_path, "elsewhere", s3, s3.endpoint, "cut"))
    assert any("resumed from" in line and "at step 4" in line for line in lines)
    assert any("everything was cached" in line for line in lines)
    assert same_student(tmp_path / "whole", tmp_path / "elsewhere")


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (404, "NoSuchKey")])
def test_objects_that_are_refused_or_gone_are_set_aside_and_places_are_named(tmp_path, s3, capsys, status, code):  # noqa: F811
    bucket = s3.bucket("data")
    s3.fill(bucket, "images", write_images(tmp_path / "images"))
    refused = Fault("status", status=status, code=code)
    with FaultyProxy(s3.port) as proxy:
        # a place that cannot be written, or not be listed: nothing trains, the entry is named, the next start goes on
        file = configure(tmp_path, "cut", s3, proxy.endpoint, "cut")
        for match, named in {
            r"GET .*data\?.*": "data.noise.aws_bucket_name",
            "PUT .*texts/": "data.texts: s3://data/cut/texts/ cannot be written",
            "PUT .*latents/": "data.latents: s3://data/cut/latents/ cannot be written",
        }.items():
            proxy.fault(refused, match=match, times=10_000)
            with pytest.raises(UserError) as caught:
                execute(file)
            assert named in str(caught.value)
            assert caught.value.exit_code == 2
            proxy.clear()
            check_whole(s3, bucket)
        execute(file)
        check_whole(s3, bucket)

        # checkpoints that cannot be copied: a warning, and the run goes on
        proxy.fault(refused, match="PUT .*checkpoint-", times=10_000)
        execute(configure(tmp_path, "alone", s3, proxy.endpoint, "alone"))
        assert "not copied to s3://data/alone/checkpoints/: checkpoint-2" in capsys.readouterr().err
        assert losses(tmp_path / "alone") == losses(tmp_path / "cut")
        assert same_student(tmp_path / "cut", tmp_path / "alone")
        proxy.clear()

        # an image, another one's caption, and an image whose header could be read: quarantined and named
        proxy.fault(Fault("none"), match=r"GET .*images/07\.png", times=1)
        for match in (r"GET .*images/03\.png", r"GET .*images/05\.txt", r"GET .*images/07\.png"):
            proxy.fault(refused, match=match, times=10_000)
        file = configure(tmp_path, "fewer", s3, proxy.endpoint, "fewer")
        _, lines = execute(file)
        assert same_names(lines, {"03.png", "05.png", "07.png"}, f"{status} {code}")
        before = losses(tmp_path / "fewer")
        assert not np.allclose(before, losses(tmp_path / "cut"), rtol=1e-4)
        proxy.clear()

        # they can be read again: a run that is resumed keeps to its samples, another one has all
        _, lines = execute(file, resume_from_checkpoint="checkpoint-2")
        assert any("resumed from" in line and "at step 2" in line for line in lines)
        assert same_names(lines, {"03.png", "05.png", "07.png"}, f"{status} {code}")
        assert losses(tmp_path / "fewer") == before
        _, lines = execute(file, overwrite=True)
        assert same_names(lines, set())
        assert np.allclose(losses(tmp_path / "fewer"), losses(tmp_path / "cut"), rtol=1e-4)  # encoded in other batches


def same_names(lines: list[str], names: set[str], reason: str = "") -> bool:
    """Whether exactly these images are said to be quarantined, for that reason."""
    said = [line for line in lines if "quarantined" in line]
    images = {f"{number:02d}.png" for number in range(13)}
    return {name for name in images if any(name in line for line in said)} == names and all(
        reason in line for line in said
    )


def test_a_checkpoint_that_is_named_is_fetched(tmp_path, s3):  # noqa: F811
    bucket = s3.bucket("data")
    s3.fill(bucket, "images", write_images(tmp_path / "images"))
    execute(configure(tmp_path, "whole", s3, s3.endpoint, "whole"))
    with pytest.raises(
        UserError, match=r"checkpoint-3.*neither as a path nor in .* nor in s3://data/whole/checkpoints/"
    ):
        execute(configure(tmp_path, "third", s3, s3.endpoint, "whole"), resume_from_checkpoint="checkpoint-3")
    file = configure(tmp_path, "elsewhere", s3, s3.endpoint, "whole")
    _, lines = execute(file, resume_from_checkpoint="checkpoint-2")
    assert any("fetching checkpoint-2 from" in line or "at step 2" in line for line in lines)
    assert losses(tmp_path / "elsewhere") == [row for row in losses(tmp_path / "whole") if row[0] > 2]
    assert same_student(tmp_path / "whole", tmp_path / "elsewhere")


def test_two_processes_share_a_bucket_and_train_as_one(tmp_path, s3):  # noqa: F811
    bucket = s3.bucket("data")
    s3.fill(bucket, "images", write_images(tmp_path / "images"))
    execute(configure(tmp_path, "one", s3, s3.endpoint, "one"))
    file = configure(tmp_path, "two", s3, s3.endpoint, "two")
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "gradient_accumulation_steps": 1, "device": "cpu"}))
    launched("-m", "distill", "run", "--config", file, timeout=400)
    for (_, ours, _), (_, theirs, _) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert check_whole(s3, bucket) > 0
    prefixes = [f"{run}/{part}/" for run in ("one", "two") for part in ("texts", "latents")]
    entries = [sum(entries_of(s3, bucket, key) for key in s3.objects(bucket, place)) for place in prefixes]
    assert entries[:2] == entries[2:], "each process pushed what it encoded, and nothing twice"
    keys = s3.objects(bucket, "two/checkpoints/")
    assert {f"two/checkpoints/checkpoint-{step}/manifest.json" for step in (2, 4, 6)} <= set(keys)

    # another machine with one process goes on from there, and encodes nothing
    shutil.rmtree(tmp_path / "two")
    _, lines = execute(configure(tmp_path, "elsewhere", s3, s3.endpoint, "two"))
    assert any("everything was cached" in line for line in lines)


def entries_of(s3, bucket: str, key: str) -> int:  # noqa: F811
    """Entries of the shards that a manifest names; 0 of other objects."""
    if not key.endswith(".jsonl"):
        return 0
    records = [json.loads(line) for line in s3.get(bucket, key).splitlines()]
    return sum(record["shard"]["count"] for record in records if "shard" in record)
