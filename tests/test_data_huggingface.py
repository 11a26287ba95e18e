"""Hugging Face datasets of every local form give the batches of a folder of the same files."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distill.core.errors import BadValue, UserError
from distill.data_backends.huggingface import HuggingFaceBackend
from support.data_helpers import FakeFamily, entry, fill, pipeline, prompts, take
from support.hf_sets import FORMS, parquet, rows_of, tars
from test_data_pipeline import MIXED, by_position


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    """The library's cache in a folder of its own, no hub, and the backend in the registry."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    registry = SimpleNamespace(get=lambda kind, name: HuggingFaceBackend)
    monkeypatch.setattr("support.data_helpers.REGISTRY", registry)


@pytest.fixture
def folder(tmp_path):
    """Images in folders, each with a caption."""
    fill(tmp_path / "set" / "cats", MIXED[:6])
    fill(tmp_path / "set" / "dogs", MIXED[6:], start=6)
    (tmp_path / "set" / "cats" / "003.txt").write_text("one\ntwo")
    return tmp_path / "set"


def hf(folder: Path, *, where: Path | None = None, settings: dict | None = None, **keys):
    """A dataset entry of this backend; `settings` are the engine's keys, `keys` the backend's."""
    own = {"cache_dir_vae": (where or folder.parent) / "latents", "write_batch_size": 3, "id": "set"}
    given = entry(folder, **{**own, **(settings or {})})
    return given.model_copy(update={"backend": HuggingFaceBackend.Config(dataset_name=str(folder), **keys)})


def backend(folder: Path, **keys) -> HuggingFaceBackend:
    return HuggingFaceBackend(HuggingFaceBackend.Config(dataset_name=str(folder), **keys))


def chunks(source: HuggingFaceBackend, **how):
    found = list(source.samples(**how))
    return {
        key: (captions, problem)
        for chunk in found
        for key, captions, problem in zip(chunk.keys, chunk.captions, chunk.problems, strict=True)
    }


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_batches_of_files(folder, tmp_path, monkeypatch, form, streaming):
    place = FORMS[form](rows_of(folder), tmp_path / form)
    data, _ = pipeline(hf(place, streaming=streaming), root=tmp_path / "hf-run")
    batches, images = by_position([take(data, 15)]), data.real_images(6, 16, 16)
    monkeypatch.undo()
    files, _ = pipeline(entry(folder), root=tmp_path / "files")
    assert by_position([take(files, 15)]) == batches
    assert files.fingerprint() == data.fingerprint()
    assert torch.equal(files.real_images(6, 16, 16), images)


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_nothing_is_encoded_again_until_it_changes(folder, tmp_path, streaming):
    place = parquet(rows_of(folder), tmp_path / "pq")
    pipeline(hf(place, streaming=streaming), root=tmp_path)[0].prepare()
    family = FakeFamily()
    pipeline(hf(place, streaming=streaming), root=tmp_path, family=family)[0].prepare()
    assert not family.prompts
    assert not family.batches
    rows = rows_of(folder)
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    parquet([(name, data, text) for name, data, text in rows if name != "cats/001.png"], place)
    pipeline(hf(place, streaming=streaming), root=tmp_path, family=family)[0].prepare()
    assert not family.batches, "the other images' bytes are what they were"


def test_sizes_and_names_from_columns_leave_images_for_the_latents(folder, tmp_path, monkeypatch):
    place = parquet(rows_of(folder), tmp_path / "pq")
    keys = {"width_column": "w", "height_column": "h", "filename_column": "file", "streaming": True}
    looked = []
    monkeypatch.setattr("distill.data_backends.huggingface.probe", looked.append)
    data, _ = pipeline(hf(place, **keys), root=tmp_path)
    batches = by_position([take(data, 15)])
    assert not looked
    monkeypatch.undo()
    files, _ = pipeline(entry(folder), root=tmp_path / "files")
    assert by_position([take(files, 15)]) == batches


def test_captions_come_from_several_nested_and_fallback_columns(folder, tmp_path):
    place = parquet(rows_of(folder), tmp_path / "pq")
    found = chunks(backend(place, caption_column=["meta.caption", "file"]))
    assert found["cats/001.png"] == (["image number 1", "cats/001.png"], "")
    rows = [(name, data, "" if name == "cats/001.png" else text) for name, data, text in rows_of(folder)]
    gaps = parquet(rows, tmp_path / "gaps")
    found = chunks(backend(gaps, caption_column="caption", fallback_caption_column="file"))
    assert found["cats/001.png"][0] == ["cats/001.png"]
    assert found["cats/002.png"][0] == ["image number 2"]
    assert chunks(backend(place, caption_column="w"))["cats/000.png"] == ([], "'w' is 32, not a text")


def test_class_labels_are_captions_by_name(tmp_path, folder):
    from datasets import ClassLabel, Dataset, Features, Image

    rows = rows_of(folder)[:3]
    features = Features({"image": Image(), "label": ClassLabel(names=["a cat", "a dog"])})
    images = [{"bytes": data, "path": None} for _, data, _ in rows]
    Dataset.from_dict({"image": images, "label": [1, 0, 1]}, features=features).save_to_disk(tmp_path / "d")
    found = chunks(backend(tmp_path / "d", caption_column="label"))
    assert found == {f"{n:09d}": ([text], "") for n, text in enumerate(["a dog", "a cat", "a dog"])}


@pytest.mark.parametrize(
    ("conditions", "left"),
    [
        ({"meta.score": {">=": 3, "<": 5}}, 2),
        ({"file": ["cats/000.png", "dogs/006.png", "no"]}, 2),
        ({"caption": "image number 1"}, 1),
        ({"meta.score": {"not in": [0, 1]}}, 8),
        ({"quality_thresholds": {"score": 8}, "quality_column": "meta"}, 2),
        ({"min_width": 48}, sum(width >= 48 for width, _ in MIXED)),
    ],
)
def test_filter_conditions_choose_samples(folder, tmp_path, conditions, left):
    place = parquet(rows_of(folder), tmp_path / "pq")
    counts = pipeline(hf(place, filter_func=conditions), root=tmp_path)[0].prepare().datasets["set"]
    assert counts.used == left
    assert counts.left_out == {"not meeting the conditions": len(MIXED) - left}
    assert not counts.quarantined


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_parts_of_a_split_are_read(folder, tmp_path, streaming):
    place = parquet(rows_of(folder), tmp_path / "pq")
    found = chunks(backend(place, split="train[2:5]", streaming=streaming))
    assert list(found) == ["cats/002.png", "cats/003.png", "cats/004.png"]
    if streaming:
        with pytest.raises(BadValue, match="given in rows"):
            chunks(backend(place, split="train[:50%]", streaming=True))
    else:
        assert len(chunks(backend(place, split="train[:50%]"))) in (5, 6)


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_captions_alone_read_no_image(folder, tmp_path, monkeypatch, streaming):
    place = parquet(rows_of(folder), tmp_path / "pq")
    read = []
    from distill.data_backends._hf_source import Source

    scan = Source.scan

    def spied(self, columns, image, resume=""):
        read.append((list(columns), image))
        for each in scan(self, columns, image, resume):
            assert set(each[1]) == set(columns)
            yield each

    monkeypatch.setattr(Source, "scan", spied)
    settings = prompts("p", instance_data_dir=tmp_path)
    config = HuggingFaceBackend.Config(dataset_name=str(place), caption_column="meta.caption", streaming=streaming)
    data, _ = pipeline(settings.model_copy(update={"backend": config}), root=tmp_path, images=False)
    data.prepare()
    assert data.num_samples == len(MIXED)
    assert read == [(["meta"], None)]


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_broken_and_absent_images_are_quarantined(folder, tmp_path, streaming):
    rows = rows_of(folder)
    rows[2] = (rows[2][0], rows[2][1][:20], rows[2][2])
    rows[5] = (rows[5][0], rows[5][1][:200], rows[5][2])
    place = tars(rows, tmp_path / "tars")
    counts = pipeline(hf(place, streaming=streaming), root=tmp_path)[0].prepare().datasets["set"]
    assert set(counts.quarantined) == {rows[2][0], rows[5][0]}
    assert counts.used == len(MIXED) - 2


# -- mistakes -----------------------------------------------------------------------------------------------------


def mistake(folder: Path, **keys) -> BadValue:
    source = HuggingFaceBackend(HuggingFaceBackend.Config(**{"dataset_name": str(folder), **keys}))

    def use() -> None:
        source.check()
        source.check_samples(images=True, captions=True)
        list(source.samples())

    with pytest.raises(BadValue) as caught:
        use()
    return caught.value


@pytest.mark.parametrize(
    ("keys", "key", "text", "remedy"),
    [
        (
            {"caption_column": "captoin"},
            "caption_column",
            "no column 'captoin'; it has 'image', 'caption'",
            "'caption'",
        ),
        ({"image_column": "photo"}, "image_column", "no column 'photo'", "image_column"),
        ({"filter_func": {"scroe": 1}}, "filter_func", "no column 'scroe'", "filter_func"),
        ({"filter_func": {"caption": {">": 3}}}, "filter_func", "cannot be compared with 3", "kind"),
        ({"split": "tarin"}, "split", "no split 'tarin'; it has 'train'", "did you mean 'train'"),
        ({"split": "tarin", "streaming": True}, "split", "no split 'tarin'; it has 'train'", "did you mean 'train'"),
        ({"dataset_config": "en"}, "dataset_config", "Available: ['default']", "dataset_config"),
        ({"dataset_name": "someone/something"}, "dataset_name", "HF_HUB_OFFLINE is set", "unset"),
        ({"dataset_name": "/nowhere/at/all"}, "dataset_name", "does not exist", "hub id"),
        ({"dataset_name": "parquet"}, "data_files", "none is named", "data_files"),
        ({"dataset_name": "parquet", "data_files": ["x/*.parquet"]}, "data_files", "does not exist", "./"),
    ],
)
def test_mistakes_list_what_is_available(folder, tmp_path, keys, key, text, remedy):
    error = mistake(parquet(rows_of(folder), tmp_path / "pq"), **keys)
    assert error.key == key
    assert text in str(error)
    assert remedy in error.remedy


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = mistake(tmp_path)
    assert (error.key, error.problem) == (
        "type",
        "datasets is not installed (pip install 'distill-engine[huggingface]')",
    )


@pytest.mark.filterwarnings("ignore:The Pandas builder")
def test_pickles_are_not_read(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    error = mistake(tmp_path, dataset_name="pandas", data_files=[str(tmp_path / "x.pkl")])
    assert "'pandas', which is not used here" in str(error)


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_a_broken_file_is_named(folder, tmp_path, streaming):
    place = parquet(rows_of(folder), tmp_path / "pq")
    file = sorted(place.iterdir())[1]
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"data\.set\.dataset_name = .*pq': cannot be read: "):
        pipeline(hf(place, streaming=streaming), root=tmp_path)[0].prepare()


def test_filters_are_checked_with_the_configuration():
    for bad, text in [
        ({"a": {"~": 1}}, "unknown comparison '~'"),
        ({"a": {}}, "no comparison"),
        ({"a": None}, "must be a value"),
        ({"quality_thresholds": 5}, "object of least values"),
        ({"quality_column": "q"}, "without quality_thresholds"),
        ({"min_width": "wide"}, "whole number of pixels"),
    ]:
        with pytest.raises(ValueError, match=text):
            HuggingFaceBackend.Config(dataset_name="a/b", filter_func=bad)


def test_a_foreign_dataset_opens_no_file_of_this_machine(tmp_path, folder):
    secret = tmp_path / "secret.png"
    secret.write_bytes((folder / "cats" / "000.png").read_bytes())
    source = HuggingFaceBackend(HuggingFaceBackend.Config(dataset_name="someone/something"))
    with pytest.raises(ValueError, match="names the file"):
        source._image({"bytes": None, "path": str(secret)})
    assert source._relative("hf://datasets/someone/something@0123abc/train/cats/1.png") == "train/cats/1.png"
    assert source._relative("/cache/datasets--a--b/snapshots/0123abc/train/1.png") == "train/1.png"


def test_a_csv_of_paths_and_a_single_file_are_read(folder, tmp_path):
    lines = ["image,caption", *(f"{name},{json.dumps(text)}" for name, _, text in rows_of(folder)[4:])]
    (folder / "list.csv").write_text("\n".join(lines))
    found = chunks(HuggingFaceBackend(HuggingFaceBackend.Config(dataset_name=str(folder / "list.csv"))))
    assert found["cats/004.png"] == (["image number 4"], "")
    place = parquet(rows_of(folder), tmp_path / "pq")
    one = sorted(place.iterdir())[0]
    keys = {"dataset_name": "parquet", "data_files": (str(one),)}
    assert next(iter(chunks(HuggingFaceBackend(HuggingFaceBackend.Config(**keys))))) == "cats/000.png"
    assert len(chunks(backend(one))) == len(MIXED) // 2
