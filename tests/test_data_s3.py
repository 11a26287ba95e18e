"""Images and prompts in a bucket: the samples of a folder, every account kept secret, every mistake named."""

import json
from pathlib import Path

import pytest
from distill.core.config.load import load_configuration
from distill.core.errors import ConfigError, OutOfReach, UserError
from distill.core.plugin_api.backend import Entry
from distill.core.registry.registry import Registry
from distill.core.settings.dataset_settings import DatasetSettings
from distill.data_backends.s3 import S3Backend
from support.data_helpers import FakeFamily, entry, fill, pipeline, prompts, take
from support.faulty_proxy import Fault, FaultyProxy
from support.quickstart import command
from support.s3_server import KEY_ID, SECRET, s3, s3_server  # noqa: F401
from support.small_run import execute, losses, write_run
from test_data_pipeline import MIXED, by_position


def remote(s3, id: str, prefix: str, *, dataset_type: str = "image", endpoint: str = "", **settings) -> DatasetSettings:  # noqa: F811
    """A dataset in the bucket `data`; keys that begin with aws_ are the backend's."""
    own = {key: value for key, value in settings.items() if key.startswith("aws_")}
    rest = {key: value for key, value in settings.items() if key not in own}
    keys = {**s3.keys("data", aws_data_prefix=prefix, aws_max_attempts=3), **own}
    keys.pop("type")
    keys["aws_endpoint_url"] = endpoint or s3.endpoint
    given = {
        "id": id, "type": "s3", "dataset_type": dataset_type, "resolution": 32, "aspect_bucket_alignment": 8,
        "crop_style": "center", **rest,
    }  # fmt: skip
    return DatasetSettings(**given).model_copy(update={"backend": S3Backend.Config(**keys)})


@pytest.fixture
def bucket(s3):  # noqa: F811
    return s3.bucket("data")


# -- samples ----------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_the_batches_of_the_folder(tmp_path, s3, bucket):  # noqa: F811
    folder = fill(tmp_path / "set", MIXED)
    (folder / "cats").mkdir()
    for path in sorted(folder.glob("00[0-4].*")):
        path.rename(folder / "cats" / path.name)
    s3.fill(bucket, "pre", folder)
    s3.put(bucket, "pre/.hidden/001.png", b"x")
    s3.put(bucket, "pre/cats/", b"")
    s3.put(bucket, "prefix/001.png", b"x")
    local, _ = pipeline(entry(folder, caption_dropout_probability=0.2, crop_style="random"), root=tmp_path / "1")
    far, lines = pipeline(remote(s3, "set", "pre", caption_dropout_probability=0.2, crop_style="random"),
                          root=tmp_path / "2")  # fmt: skip
    assert by_position([take(local, 12)]) == by_position([take(far, 12)])
    assert local.fingerprint() == far.fingerprint()
    again = FakeFamily()
    pipeline(remote(s3, "set", "pre"), root=tmp_path / "3", family=again)[0].prepare()
    before = again.num_images
    pipeline(remote(s3, "set", "pre"), root=tmp_path / "3", family=again)[0].prepare()
    assert again.num_images == before == 10


def test_only_headers_are_read_for_the_index(tmp_path, s3, bucket):  # noqa: F811
    from distill.core.data.index.index_builder import IndexBuilder
    from distill.core.data.samples.captions import CaptionRules
    from distill.core.utils.progress import default_progress
    from PIL import Image

    for number in range(4):
        Image.effect_noise((1500, 1000), 100).convert("RGB").save(tmp_path / "a.jpg", quality=95)
        s3.put(bucket, f"big/{number}.jpg", (tmp_path / "a.jpg").read_bytes())
        s3.put(bucket, f"big/{number}.txt", b"noise")
    with FaultyProxy(s3.port) as proxy:
        settings = remote(s3, "big", "big", endpoint=proxy.endpoint)
        builder = IndexBuilder("big", S3Backend(settings.backend), CaptionRules(settings), workers=1,
                               progress=default_progress())  # fmt: skip
        index = builder.build(tmp_path / "index")
        assert index.width.tolist() == [1500] * 4
        assert proxy.count("GET .*jpg") == 4
        assert proxy.num_bytes < 4 * 100_000 < (tmp_path / "a.jpg").stat().st_size


def test_prompts_in_a_bucket(tmp_path, s3, bucket):  # noqa: F811
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a fox\na hare\n")
    (tmp_path / "texts" / "b.txt").write_text("an owl\n")
    (tmp_path / "all.jsonl").write_text('{"caption": "a fox"}\n{"caption": "an owl"}\n')
    s3.fill(bucket, "p", tmp_path)
    for place, own in (
        ("instance_data_dir", ("p/texts", {})),
        ("prompts_file", ("p", {"aws_prompts_file": "all.jsonl"})),
    ):
        path = tmp_path / ("texts" if place == "instance_data_dir" else "all.jsonl")
        local, _ = pipeline(prompts("words", **{place: path}), root=tmp_path / f"1{place}", images=False)
        settings = remote(s3, "words", own[0], dataset_type="prompts", **own[1])
        far, _ = pipeline(settings, root=tmp_path / f"2{place}", images=False)
        assert local.prepare().num_samples == far.prepare().num_samples == (3 if place == "instance_data_dir" else 2)
        assert local.fingerprint() == far.fingerprint()


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, "the bucket 'data2' does not exist"), (Fault("status", status=403, code="AccessDenied"), "AccessDenied"),
        (Fault("status", status=403, code="InvalidAccessKeyId"), "does not accept the credentials"),
    ],
)  # fmt: skip
def test_a_bucket_that_cannot_be_listed_is_named_with_its_key(tmp_path, s3, bucket, fault, said):  # noqa: F811
    with FaultyProxy(s3.port) as proxy:
        if fault:
            proxy.fault(fault, match="GET .*list-type")
        settings = remote(s3, "set", "pre", endpoint=proxy.endpoint, aws_bucket_name="data" if fault else "data2")
        with pytest.raises(UserError, match=said) as caught:
            pipeline(settings, root=tmp_path)[0].prepare()
    assert caught.value.exit_code == 2
    assert "data.set.aws_bucket_name = 'data" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_single_objects_that_are_refused_are_quarantined(tmp_path, s3, bucket):  # noqa: F811
    s3.fill(bucket, "pre", fill(tmp_path / "set", MIXED))
    with FaultyProxy(s3.port) as proxy:
        proxy.fault(Fault("status", status=403, code="AccessDenied"), match="GET .*003.png")
        proxy.fault(Fault("status", status=404, code="NoSuchKey"), match="GET .*004.png")
        settings = remote(s3, "set", "pre", endpoint=proxy.endpoint)
        counts = pipeline(settings, root=tmp_path)[0].prepare().datasets["set"]
        assert counts.quarantined == {
            "003.png": "access is refused (403 AccessDenied)", "004.png": "it is not there (404 NoSuchKey)"
        }  # fmt: skip
        assert pipeline(settings, root=tmp_path)[0].prepare().datasets["set"].used == 10, (
            "tried again at the next start"
        )


def test_an_unreachable_server_ends_the_build_soon(tmp_path, s3, bucket):  # noqa: F811
    """Not after every one of its images has had its retries."""
    s3.fill(bucket, "pre", fill(tmp_path / "set", [(32, 32)] * 60))
    with FaultyProxy(s3.port) as proxy:
        proxy.fault(Fault("drop"), match="GET .*png", times=10_000)
        settings = remote(s3, "set", "pre", endpoint=proxy.endpoint, aws_max_pool_connections=2)
        with pytest.raises(OutOfReach, match="connection broke off") as caught:
            pipeline(settings, root=tmp_path)[0].prepare()
        assert caught.value.exit_code == 1
        assert proxy.count("GET .*png") < 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aws_bucket_name": "a/b"}, "data.set.aws_bucket_name"), ({"aws_endpoint_url": "host:9000"}, "is no address"),
        ({"aws_secret_access_key": None}, "aws_secret_access_key is required"),
        ({"aws_bucket_nam": "x"}, "did you mean 'aws_bucket_name'"),
        ({"instance_data_dir": "images"}, "is not read by the data backend 's3'"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_any_request(tmp_path, s3, change, said):  # noqa: F811
    values = {"id": "set", **s3.keys("data"), **change}
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path, [values])
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
    assert KEY_ID not in str(caught.value)


@pytest.mark.parametrize("dataset_type", ["text_embeds", "vae_embeds"])
def test_the_keys_of_caches_are_checked_too(tmp_path, s3, dataset_type):  # noqa: F811
    cache = {"id": "cache", "dataset_type": dataset_type, **s3.keys("data"), "aws_bucket_nam": "x"}
    with pytest.raises(ConfigError, match="did you mean 'aws_bucket_name'"):
        configured(tmp_path, [{"id": "set", **s3.keys("data")}, cache])


def configured(root: Path, entries: list[dict[str, object]], **settings):
    file = write_run(root, **settings)
    (root / "multidatabackend.json").write_text(json.dumps(entries))
    return load_configuration(Registry.load(installed=False), config_file=file)


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_secrets_are_never_written(tmp_path, s3, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MY_SECRET", SECRET)
    keys = s3.keys("data", aws_secret_access_key="{env:MY_SECRET}", aws_session_token=f"token-{SECRET}", type="aws")
    configuration = configured(tmp_path, [{"id": "set", **keys}])
    assert configuration.datasets[0].backend.aws_secret_access_key.get_secret_value() == SECRET
    for text in (repr(configuration), str(configuration), json.dumps(configuration.resolved())):
        assert SECRET not in text
        assert KEY_ID not in text
    resolved = configuration.resolved()["data"][0]
    assert resolved["aws_secret_access_key"] == "{env:MY_SECRET}"
    assert "aws_session_token" not in resolved
    assert resolved["type"] == "s3"
    shown = command("config", "show", "--config", str(tmp_path / "out.json"))
    assert shown.code == 0
    assert SECRET not in shown.out + shown.err
    doctor = command("doctor", "--config", str(tmp_path / "out.json"))
    assert doctor.code == 0, doctor.err
    assert "data.set  a key in the data file" in doctor.out
    assert "none in the environment or the shared files" in doctor.out
    assert SECRET not in doctor.out + doctor.err


def test_a_resolved_configuration_runs_again(tmp_path, s3, bucket, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MY_ID", KEY_ID)
    monkeypatch.setenv("MY_SECRET", SECRET)
    from support.small_run import write_images

    s3.fill(bucket, "noise", write_images(tmp_path / "images"))
    account = {"aws_access_key_id": "{env:MY_ID}", "aws_secret_access_key": "{env:MY_SECRET}"}
    data = [{"id": "noise", **s3.keys(bucket, aws_data_prefix="noise", **account)}]
    file = write_run_again(tmp_path, "far", data)
    execute(file)
    resolved = (tmp_path / "far" / "config.resolved.json").read_text()
    assert SECRET not in resolved
    again = command("run", "--config", str(tmp_path / "far" / "config.resolved.json"), "--output-dir",
                    str(tmp_path / "again"))  # fmt: skip
    assert again.code == 0, again.err
    assert losses(tmp_path / "again") == losses(tmp_path / "far")
    for path in (tmp_path / "far").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def write_run_again(root: Path, output: str, data: list[dict[str, object]]) -> Path:
    """The small run with other data."""
    file = write_run(root, output=output, max_train_steps=2, validation_step_interval=0)
    (root / "multidatabackend.json").write_text(json.dumps(data))
    return file


def test_cache_objects_are_named_like_files(s3, bucket):  # noqa: F811
    s3.put(bucket, "pre/cats/001.jpg", b"abc")
    backend = S3Backend(remote(s3, "set", "/pre/").backend)
    (found,) = backend.list()
    assert found == Entry("cats/001.jpg", 3, found.version) == backend.entry("cats/001.jpg")
    assert backend.location == "s3://data/pre/"
