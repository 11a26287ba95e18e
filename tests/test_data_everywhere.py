"""The same pictures from every kind of place: the same batches, bit for bit, in the same order."""

import pytest
from support.data_helpers import FakeFamily, pipeline, source, take
from support.sources import write_csv, write_folder, write_jsonl, write_parquet, write_shards
from test_data_pipeline import by_position

COMMON = {"random_flip": True, "caption_dropout_probability": 0.2, "crop": True, "crop_style": "random"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("everywhere") / "pictures")


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


SOURCES = (csv_source, jsonl_source, parquet_source, parquet_bytes_source, shards_source, json_shards_source)


def loaded(settings, root):
    data, _ = pipeline(settings, root=root, family=FakeFamily(), micro=3, accumulation=2)
    return by_position([take(data, 12)]), data.fingerprint()


@pytest.fixture(scope="module")
def expected(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    settings = source("set", "local", root / "vae", instance_data_dir=pictures, **COMMON)
    return loaded(settings, root)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__.removesuffix("_source"))
def test_the_same_pictures_give_the_same_batches(make, pictures, expected, tmp_path):
    kind, keys = make(pictures, tmp_path)
    assert loaded(source("set", kind, tmp_path / "vae", **keys, **COMMON), tmp_path) == expected
