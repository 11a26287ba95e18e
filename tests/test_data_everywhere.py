"""The same images from every kind of place: the same batches, bit for bit, in the same order."""

import json
import shutil

import pytest
from distill.core.data.tables import locations as located
from support import data_helpers
from support.data_helpers import FakeFamily, pipeline, source, take
from support.s3_server import KEY_ID, REGION, SECRET, s3, s3_server  # noqa: F401 - fixtures
from support.small_run import execute, losses, write_run
from support.sources import write_csv, write_folder, write_jsonl, write_parquet, write_shards
from test_data_pipeline import by_position

COMMON = {"random_flip": True, "caption_dropout_probability": 0.2, "crop": True, "crop_style": "random"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("everywhere") / "images")


def csv_source(folder, root):
    return "csv", {"csv_file": write_csv(folder, root / "t.csv"), "instance_data_dir": folder}


def jsonl_source(folder, root):
    return "jsonl", {"jsonl_file": write_jsonl(folder, root / "t.jsonl"), "instance_data_dir": folder}


def parquet_source(folder, root):
    return "parquet", {"parquet_file": write_parquet(folder, root / "t.parquet")}


def parquet_bytes_source(folder, root):
    file = write_parquet(folder, root / "t.parquet", struct=False)
    return "parquet", {"parquet_file": file, "filename_column": "name"}


def shards_source(folder, root):
    write_shards(folder, root / "shards")
    return "webdataset", {"shards": str(root / "shards" / "shard-{000..002}.tar")}


def json_shards_source(folder, root):
    return "webdataset", {
        "shards": write_shards(folder, root / "shards", as_json=True),
        "caption_column": ("meta.caption",),
    }


def beside_source(folder, root):
    table = write_jsonl(folder, root / "metadata.jsonl")
    return "local", {"instance_data_dir": folder, "metadata_file": str(table), "caption_strategy": "jsonl"}


def huggingface_source(folder, root):
    return "huggingface", {"dataset_name": str(write_parquet(folder, root / "t.parquet"))}


LOCAL = (
    csv_source, jsonl_source, parquet_source, parquet_bytes_source, shards_source, json_shards_source, beside_source,
    huggingface_source,
)  # fmt: skip


def loaded(settings, root):
    data, _ = pipeline(settings, root=root, family=FakeFamily(), micro=3, accumulation=2)
    return by_position([take(data, 12)]), data.fingerprint()


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    settings = source("set", "local", root / "vae", instance_data_dir=images, **COMMON)
    return loaded(settings, root)


@pytest.fixture(autouse=True)
def hugging_face(monkeypatch):
    from distill.data_backends.huggingface import HuggingFaceBackend

    monkeypatch.setitem(data_helpers.BACKENDS, HuggingFaceBackend.name, HuggingFaceBackend)


@pytest.mark.parametrize("make", LOCAL, ids=lambda make: make.__name__.removesuffix("_source"))
def test_the_same_images_give_the_same_batches(make, images, expected, tmp_path):
    kind, keys = make(images, tmp_path)
    assert loaded(source("set", kind, tmp_path / "vae", **keys, **COMMON), tmp_path) == expected


@pytest.fixture
def bucket(s3, images, tmp_path, monkeypatch):  # noqa: F811
    """A bucket with the images as objects, in shards and in tables; the usual variables say how it is reached."""
    s3.bucket("everywhere")
    write_shards(images, tmp_path / "all" / "shards")
    write_parquet(images, tmp_path / "all" / "t.parquet")
    write_csv(images, tmp_path / "all" / "t.csv")
    s3.fill("everywhere", "images", images)
    s3.fill("everywhere", "all", tmp_path / "all")
    for name, value in (("ENDPOINT_URL", s3.endpoint), ("ACCESS_KEY_ID", KEY_ID), ("SECRET_ACCESS_KEY", SECRET),
                        ("DEFAULT_REGION", REGION)):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    located._store.cache_clear()
    yield s3
    located._store.cache_clear()


REMOTE = {
    "bucket": ("s3", {"aws_bucket_name": "everywhere", "aws_data_prefix": "images"}),
    "shards": ("webdataset", {"shards": "s3://everywhere/all/shards/shard-{000..002}.tar"}),
    "shards-glob": ("webdataset", {"shards": "s3://everywhere/all/shards/*.tar"}),
    "parquet": ("parquet", {"parquet_file": "s3://everywhere/all"}),
    "csv": ("csv", {"csv_file": "s3://everywhere/all/t.csv", "instance_data_dir": "s3://everywhere/images"}),
}


@pytest.mark.parametrize("name", REMOTE)
def test_the_same_images_from_a_bucket_give_the_same_batches(name, bucket, expected, tmp_path):
    kind, keys = REMOTE[name]
    assert loaded(source("set", kind, tmp_path / "vae", **keys, **COMMON), tmp_path) == expected


@pytest.fixture
def website(images, tmp_path):
    """Address of a plain file server with the images, tables and shards."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    site = tmp_path / "site"
    shutil.copytree(images, site / "images")
    write_shards(images, site / "shards")
    write_parquet(images, site / "t.parquet")
    write_csv(images, site / "t.csv")
    write_jsonl(images, site / "t.jsonl")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        located._store.cache_clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    located._store.cache_clear()


SITE = {
    "csv": ("csv", {"csv_file": "{}/t.csv", "instance_data_dir": "{}/images"}),
    "jsonl": ("jsonl", {"jsonl_file": "{}/t.jsonl", "instance_data_dir": "{}/images"}),
    "parquet": ("parquet", {"parquet_file": "{}/t.parquet"}),
    "shards": ("webdataset", {"shards": "{}/shards/shard-{{000..002}}.tar"}),
}


@pytest.mark.parametrize("name", SITE)
def test_the_same_images_from_a_web_server_give_the_same_batches(name, website, expected, tmp_path):
    kind, keys = SITE[name]
    paths = {key: value.format(website) for key, value in keys.items()}
    assert loaded(source("set", kind, tmp_path / "vae", **paths, **COMMON), tmp_path) == expected


STRATEGIES = {
    "filename": {"caption_strategy": "filename"},
    "instanceprompt": {"caption_strategy": "instanceprompt", "instance_prompt": "sks"},
    "prepended": {"instance_prompt": "sks", "prepend_instance_prompt": True},
    "only": {"instance_prompt": "sks", "only_instance_prompt": True},
    "filtered": {"caption_filter_list": ("s/[aeiou]/o/", "the")},
    "shuffled": {"caption_shuffle": True},
    "joined": {"disable_multiline_split": True},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_captions_are_made_in_the_same_way_from_every_source(strategy, images, tmp_path):
    rules = {**STRATEGIES[strategy], "caption_dropout_probability": 0.1}
    expected = loaded(source("set", "local", tmp_path / "vae", instance_data_dir=images, **rules), tmp_path)
    for make in LOCAL:
        if make is beside_source and "caption_strategy" in rules:
            continue  # its strategy says that the captions are in the table
        if strategy == "joined" and make not in (csv_source, shards_source):
            continue  # lists of captions have no lines to join
        (root := tmp_path / make.__name__).mkdir()
        kind, keys = make(images, root)
        found = loaded(source("set", kind, root / "vae", **{**keys, **rules}), root)
        assert found == expected, make.__name__


@pytest.mark.slow
def test_another_source_changes_only_type_and_location(tmp_path, images):
    """A whole run on each; the data file differs in ``type`` and where things lie."""
    found = {}
    for make in (None, csv_source, jsonl_source, parquet_source, shards_source):
        name = make.__name__ if make else "local"
        (tmp_path / name).mkdir()
        kind, keys = make(images, tmp_path / name) if make else ("local", {"instance_data_dir": images})
        config = write_run(
            tmp_path, output=name, max_train_steps=3, validation_step_interval=0, checkpoint_step_interval=0
        )
        entry = {"id": "set", "type": kind, "caption_strategy": "textfile", **keys}
        (tmp_path / "multidatabackend.json").write_text(json.dumps([entry], default=str))
        assert execute(config)[0].steps == 3
        found[name] = losses(tmp_path / name)
    assert all(each == found["local"] for each in found.values())
    assert len(found["local"]) == 3
