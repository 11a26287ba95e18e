"""Students in archives and buckets, at the end of a run and by `distill publish`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from distill.core.cli.options import service_notices
from distill.core.config.load import load_configuration
from distill.core.errors import UserError
from distill.core.plugin_api.publisher import PublishSetting
from distill.core.registry.registry import Registry
from distill.core.runs.output_folder import RESOLVED
from distill.core.runs.publishing import Publishers, build_publishers
from distill.plugins.archive import Archive
from distill.plugins.bucket import Bucket
from support.faulty_proxy import Fault, FaultyProxy
from support.finished_run import write_finished_run
from support.s3_server import S3Server, s3, s3_server  # noqa: F401
from support.small_run import execute, write_run
from typer.testing import CliRunner

FILES = {"README.md": b"# Student\n", "scheduler/scheduler_config.json": b"{}", "weights.safetensors": bytes(70_000)}


@pytest.fixture
def student(tmp_path) -> Path:
    return write_student(tmp_path / "out" / "student")


def write_student(folder: Path, names=tuple(FILES)) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(FILES[name])
    return folder


# -- archive -----------------------------------------------------------------------------------------------------------


def archive(**config) -> Archive:
    return Archive(Archive.Config(**config), PublishSetting("fox"))


def members(file: Path) -> dict[str, bytes]:
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as opened:
            assert opened.testzip() is None
            return {name: opened.read(name) for name in opened.namelist()}
    with tarfile.open(file, "r:gz") as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["tar.gz", "zip"])
@pytest.mark.parametrize("compression", [0, 6])
def test_an_archive_holds_the_student_in_the_same_bytes_whenever_it_is_packed(form, compression, student, tmp_path):
    place = archive(format=form, compression=compression).publish(student)
    file = student.parent / f"fox.{form}"
    assert place == str(file)
    assert members(file) == {f"fox/{name}": content for name, content in FILES.items()}
    again = write_student(tmp_path / "elsewhere" / "student", tuple(reversed(FILES)))
    for path in again.rglob("*"):
        os.utime(path, (1, 1))
    (again / "README.md").chmod(0o755)
    archive(format=form, compression=compression).publish(again)
    assert (again.parent / f"fox.{form}").read_bytes() == file.read_bytes()
    assert (file.stat().st_size > 70_000) == (compression == 0)


def test_an_archive_is_complete_or_absent(student, monkeypatch, said):
    file = student.parent / "fox.tar.gz"
    file.write_bytes(b"of an earlier run")
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
    assert Publishers({"archive": archive()}).publish(student) == []
    assert "no space left" in said[0]
    assert file.read_bytes() == b"of an earlier run"
    assert sorted(path.name for path in student.parent.iterdir()) == ["fox.tar.gz", "student"]


def test_an_archive_says_at_the_start_where_it_cannot_be_written(tmp_path, student):
    (tmp_path / "file").write_text("x")
    assert "is a folder" in archive(file=tmp_path).problems()[0]
    assert "cannot be written" in archive(file=tmp_path / "file" / "a.tar.gz").problems()[0]
    new = tmp_path / "new" / "folder" / "a.tar.gz"
    assert archive(file=new).problems() == archive().problems() == []
    archive(file=new).publish(student)
    assert members(new)
    with pytest.raises(UserError, match="holds no file"):
        archive().publish(tmp_path / "nothing")


# -- bucket ------------------------------------------------------------------------------------------------------------


def bucket(server: S3Server, name: str = "students", *, endpoint: str | None = None, **config) -> Bucket:
    keys = server.keys(name, aws_max_attempts=2, **config)
    keys |= {"aws_endpoint_url": endpoint} if endpoint else {}
    return Bucket(Bucket.Config(**{key: value for key, value in keys.items() if key != "type"}), PublishSetting("fox"))


def manifest(server: S3Server, key: str = "fox/manifest.json") -> dict:
    return json.loads(server.get("students", key))


def test_a_bucket_holds_the_student_and_what_it_is(s3, student):  # noqa: F811
    s3.bucket("students")
    publisher = bucket(s3)
    assert publisher.problems() == []
    assert s3.objects("students") == [], "the check leaves nothing"
    assert publisher.publish(student) == "s3://students/fox"
    assert s3.objects("students") == [f"fox/{name}" for name in sorted([*FILES, "manifest.json"])]
    assert {name: s3.get("students", f"fox/{name}") for name in FILES} == FILES
    found = manifest(s3)
    assert found["complete"] is True
    assert found["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    assert bucket(s3, aws_prefix="a/b/").publish(student) == "s3://students/a/b"
    assert manifest(s3, "a/b/manifest.json") == found


def test_a_large_file_goes_up_in_parts(s3, student):  # noqa: F811
    s3.bucket("students")
    large = os.urandom(1000) * 17_000  # just above one part
    (student / "weights.safetensors").write_bytes(large)
    bucket(s3).publish(student)
    assert s3.get("students", "fox/weights.safetensors") == large
    assert s3.client.head_object(Bucket="students", Key="fox/weights.safetensors")["ETag"].endswith('-2"')


def test_a_server_that_fails_in_the_middle_is_a_warning_and_nothing_half_is_marked_as_whole(s3, student, said):  # noqa: F811
    s3.bucket("students")
    bucket(s3).publish(student)
    assert manifest(s3)["complete"] is True, "of an earlier run"
    (student / "weights.safetensors").write_bytes(b"new")
    with FaultyProxy(s3.port) as proxy:
        proxy.fault(Fault("status", status=503), match="PUT .*weights", times=10_000)
        publishers = Publishers({"s3": bucket(s3, endpoint=proxy.endpoint)})
        assert publishers.publish(student) == []
        assert "warning: s3: publishing failed" in said[0]
        assert "s3://students/fox" in said[0]
        assert "resume_from_checkpoint" not in said[0]
        assert manifest(s3) == {"complete": False, "files": {}}
        proxy.clear()
        proxy.fault(Fault("status", status=503), times=1)  # one bad answer is ridden out
        assert publishers.publish(student) == ["s3://students/fox"]
    assert manifest(s3)["complete"] is True
    assert s3.get("students", "fox/weights.safetensors") == b"new"


def test_a_bucket_that_cannot_be_used_is_said_at_the_start(s3):  # noqa: F811
    s3.bucket("students")
    assert "aws_bucket_name is missing" in Bucket(Bucket.Config()).problems()[0]
    assert "the folder is aws_prefix" in bucket(s3, "students/fox").problems()[0]
    assert "is no address" in bucket(s3, endpoint="localhost:1").problems()[0]
    assert "does not exist" in bucket(s3, "nobodys").problems()[0]
    (problem,) = bucket(s3, endpoint="http://127.0.0.1:9").problems()
    assert "cannot be written" in problem
    with FaultyProxy(s3.port) as proxy:
        proxy.fault(Fault("status", status=403, code="AccessDenied"), times=100)
        assert "AccessDenied" in bucket(s3, endpoint=proxy.endpoint).problems()[0]
        proxy.clear()
        proxy.fault(Fault("status", status=403, code="AccessDenied"), match="DELETE", times=100)
        assert bucket(s3, endpoint=proxy.endpoint).problems() == [], "who may only write can publish"
    assert "given together" in bucket(s3, aws_secret_access_key=None).problems()[0]


# -- a run, and the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return write_finished_run(tmp_path_factory.mktemp("finished"))


def distill(*arguments: object):
    from distill.core.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_finished_run_is_published_by_the_command(finished, s3, tmp_path):  # noqa: F811
    s3.bucket("students")
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    keys = {key: value for key, value in s3.keys("students", aws_max_attempts=2).items() if key != "type"}
    sets = [part for key, value in keys.items() for part in ("--set", f"publisher_config.s3.{key}={value}")]
    done = distill("publish", output, "--to", "comfyui, archive,s3", *sets)
    assert done.exit_code == 0, done.output
    for place in (output / "out-kohya.safetensors", output / "out.tar.gz", "s3://students/out"):
        assert f"published to {place}" in done.output
    student = {path.relative_to(output / "student").as_posix() for path in (output / "student").rglob("*.*")}
    packed = members(output / "out.tar.gz")
    assert {name.removeprefix("out/") for name in packed} == student
    weights = (output / "student" / "pytorch_lora_weights.safetensors").read_bytes()
    assert packed["out/pytorch_lora_weights.safetensors"] == weights
    assert s3.get("students", "out/pytorch_lora_weights.safetensors") == weights


def test_the_command_refuses_what_cannot_work_and_fails_when_a_publisher_does(finished, tmp_path, monkeypatch):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    for arguments, reason in {
        (): "the run publishes nowhere",
        ("--to", "archvie"): "did you mean 'archive'",
        ("--to", "s3,archive"): "aws_bucket_name is missing",
        ("--to", "hub"): "hub_model_id is missing",
    }.items():
        done = distill("publish", output, *arguments)
        assert (done.exit_code, reason in done.output) == (2, True), done.output
    assert not (output / "out.tar.gz").exists()
    monkeypatch.setattr(Archive, "publish", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    done = distill("publish", output, "--to", "archive,kohya")
    assert done.exit_code == 1
    assert "warning: archive: publishing failed: OSError: no space" in done.output
    assert "1 of 2 publishers failed" in done.output
    assert (output / "out-kohya.safetensors").is_file()


def test_the_runs_own_publishers_are_the_default_and_secrets_stay_out_of_the_file(finished, tmp_path, monkeypatch):
    root = finished.parent
    monkeypatch.setenv("STUDENTS_SECRET", "s3cr3t")
    config = json.loads((root / "out.json").read_text())
    account = {"aws_access_key_id": "AKIA", "aws_secret_access_key": "{env:STUDENTS_SECRET}"}
    config |= {"publish_to": ["comfyui", "archive"], "publisher_config": {"archive": {"format": "zip"}, "s3": account}}
    (root / "publishing.json").write_text(json.dumps(config))
    registry = Registry.load(installed=False)
    configuration = load_configuration(registry, config_file=root / "publishing.json")
    publishers, _ = build_publishers(registry, configuration)
    assert publishers.names == ("archive", "kohya")
    resolved = json.dumps(configuration.resolved())
    assert "AKIA" not in resolved
    assert "s3cr3t" not in resolved
    assert "{env:STUDENTS_SECRET}" in resolved
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    (output / RESOLVED).write_text(resolved)
    done = distill("publish", output)
    assert done.exit_code == 0, done.output
    assert zipfile.is_zipfile(io.BytesIO((output / "out.zip").read_bytes()))
    assert (output / "out-kohya.safetensors").is_file()


def test_a_run_publishes_at_its_end_and_says_at_its_start_what_it_cannot(tmp_path):
    few = {"max_train_steps": 1, "validation_step_interval": 0, "publish_to": ["archive", "kohya", "s3"]}
    result, lines = execute(write_run(tmp_path, **few))
    told = next(line for line in lines if "s3: publisher_config.s3.aws_bucket_name is missing" in line)
    assert told.startswith("warning: ")
    assert lines.index(told) < next(n for n, line in enumerate(lines) if line.startswith("report on dataset"))
    assert (result.output_dir / "out-kohya.safetensors").is_file()
    packed = members(result.output_dir / "out.tar.gz")
    assert packed["out/README.md"] == (result.student / "README.md").read_bytes(), "the model card is in it"
    registry = Registry.load(installed=False)
    full = load_configuration(registry, config_file=write_run(tmp_path, output="full", model_type="full", **few))
    notices = service_notices(full, registry)
    assert any(notice.startswith("kohya: kohya's format is for LoRAs") for notice in notices)
