"""A whole run whose pictures, caches and checkpoints are in a bucket that goes away and comes back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from distill.core.errors import OutOfReach
from safetensors.torch import load_file
from support.faulty_proxy import Fault, FaultyProxy
from support.s3_server import s3, s3_server  # noqa: F401
from support.small_run import execute, losses, write_pictures, write_run
from test_mirror import check_whole

pytestmark = pytest.mark.slow
PARTS = {"texts": "text_embeds", "latents": "vae_embeds", "checkpoints": "checkpoints"}


def configure(
    root: Path,
    output: str,
    s3,
    endpoint: str,
    prefix: str,
    *,
    patience: int = 3,
    timeout: float = 10,  # noqa: F811
) -> Path:
    """The small run with everything in the bucket, under a prefix of its own."""
    file = write_run(root, output=output, max_train_steps=6, checkpoint_step_interval=2, validation_step_interval=0)
    reach = {**s3.keys("data", aws_max_attempts=patience, aws_timeout_seconds=timeout), "aws_endpoint_url": endpoint}
    data = [{"id": "noise", **reach, "aws_data_prefix": "pictures"}]
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
    s3.fill(bucket, "pictures", write_pictures(tmp_path / "pictures"))
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
        proxy.fault(Fault("status", status=503), match="PUT .*checkpoint-2/", times=9)
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
