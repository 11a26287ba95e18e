"""Tables and tar shards: what is found in them, what is quarantined, and what is read again."""

import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distill.core.errors import UserError
from distill.data_backends import _row_groups
from distill.data_backends.tables import ParquetBackend
from support.config_files import Pair, distill, said
from support.data_helpers import FakeFamily, fill, pipeline, prompts, source, take
from support.sources import add, rows, write_csv, write_folder, write_parquet, write_shards

SIZES = [(32, 32)] * 4


def prepared(settings, root, **more):
    data, lines = pipeline(settings, root=root, **more)
    return data, data.prepare().datasets[settings.id], lines


def captions_of(data, steps):
    found = {}
    for (batch,) in take(data, steps):
        found |= dict(zip(batch.keys, batch.captions, strict=True))
    return found


def test_unusable_rows_are_quarantined_with_their_reason(tmp_path):
    folder = fill(tmp_path / "set", SIZES)
    (folder / "bad.png").write_bytes(b"no image")
    lines = [
        {"image": "000.png", "caption": "good"}, {"image": "gone.png", "caption": "x"}, {"image": None, "caption": "x"},
        {"image": "bad.png", "caption": "x"}, {"image": "001.png", "caption": 3}, {"image": "002.png", "caption": None},
    ]  # fmt: skip
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, counts, _ = prepared(source("t", "jsonl", tmp_path / "vae", jsonl_file=folder / "t.jsonl"), tmp_path)
    assert counts.used == 1
    assert counts.left_out == {"no caption": 1}
    assert {key: why.split(":")[0] for key, why in counts.quarantined.items()} == {
        "gone.png": "No such file or directory",
        "row-000000002": "it has no image",
        "bad.png": counts.quarantined["bad.png"],
        "001.png": "'caption' is 3, not a text",
    }


def test_bytes_inside_a_table_are_hashed_and_read_again_only_when_they_change(tmp_path, monkeypatch):
    folder = fill(tmp_path / "set", SIZES)
    found = [(name, (folder / name).read_bytes()) for name in ("000.png", "001.png", "002.png")]

    def write(found):
        columns = {
            "image": [{"bytes": data, "path": name} for name, data in found],
            "text": ["a", "b", "c"][: len(found)],
        }
        pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=2)

    def encoded():
        family = FakeFamily()
        settings = source("t", "parquet", tmp_path / "vae", parquet_file=tmp_path / "t.parquet")
        prepared(settings, tmp_path, family=family)
        return family.num_images

    write(found)
    assert encoded() == 3
    opened = []
    monkeypatch.setattr(ParquetBackend, "samples", lambda *_, **__: opened.append(1) or iter(()))
    assert encoded() == 0
    assert not opened, "an index of a table that has not changed is taken as it is"
    monkeypatch.undo()
    write([found[1], found[0], ("002.png", (folder / "003.png").read_bytes())])
    assert encoded() == 1, "moved rows keep their latents; a changed image is encoded"


def test_a_row_group_is_read_once_for_its_images(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", 10)
    backend = ParquetBackend(ParquetBackend.Config(parquet_file=write_parquet(folder, tmp_path / "t.parquet")))
    read = []
    inner = _row_groups.RowGroups._read
    monkeypatch.setattr(
        _row_groups.RowGroups, "_read", lambda self, group: read.append(group.number) or inner(self, group)
    )
    chunks = list(backend.samples())
    positions = dict(pair for chunk in chunks for pair in zip(chunk.keys, chunk.positions, strict=True))
    for name, data, _ in rows(folder):
        assert backend.open(positions[name]).read() == data
    assert sorted(read) == [0, 1]
    assert not backend.in_order
    passed = [opened().read() for chunk in backend.sequential() for opened in chunk.images]
    assert passed == [data for _, data, _ in rows(folder)]
    assert [chunk.positions[0] for chunk in backend.sequential("1")] == [5]
    monkeypatch.setattr(_row_groups, "LARGEST_GROUP", 100)
    again = source("t", "parquet", tmp_path / "vae", parquet_file=tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row_group_size=100"):
        prepared(again, tmp_path)


def test_sizes_in_columns_replace_reading_headers_and_are_checked_when_encoding(tmp_path, monkeypatch):
    folder = fill(tmp_path / "set", SIZES[:2])
    (folder / "t.csv").write_text("file_name,caption,width,height\n000.png,a,32,32\n001.png,b,64,32\n")
    monkeypatch.setattr("distill.core.data.index.index_builder.probe", lambda stream: pytest.fail("the table says it"))
    keys = {"csv_file": folder / "t.csv", "width_column": "width", "height_column": "height"}
    _, counts, _ = prepared(source("t", "csv", tmp_path / "vae", **keys), tmp_path)
    assert counts.used == 1
    assert "it is 32x32" in counts.quarantined["001.png"]


def test_a_table_beside_images_gives_captions_and_sizes(tmp_path):
    folder = fill(tmp_path / "set", SIZES, captions=False)
    table = {"id": ["000", "./001.png", "gone"], "caption": [["one", "two"], ["three"], ["x"]],
             "width": [32, 32, 1], "height": [32, 32, 1]}  # fmt: skip
    pq.write_table(pa.table(table), folder / "meta.parquet")
    keys = {"metadata_file": "meta.parquet", "caption_strategy": "parquet", "metadata_backend": "parquet"}
    data, counts, lines = prepared(source("t", "local", tmp_path / "vae", instance_data_dir=folder, **keys), tmp_path)
    assert (counts.used, counts.left_out) == (2, {"no caption": 2})
    assert any("1 rows of meta.parquet are of no image" in line for line in lines)
    assert set(captions_of(data, 8).values()) == {"one", "two", "three"}
    table["caption"][1] = ["four"]
    pq.write_table(pa.table(table), folder / "meta.parquet")
    data, _, _ = prepared(source("t", "local", tmp_path / "vae", instance_data_dir=folder, **keys), tmp_path)
    assert "four" in captions_of(data, 8).values()


def test_prompts_come_from_tables_and_shards(tmp_path):
    folder = write_folder(tmp_path / "set", 6)
    wanted = {line for _, _, text in rows(folder) for line in text.splitlines()}
    positions = {
        "csv": {"csv_file": write_csv(folder, tmp_path / "t.csv")},
        "parquet": {"parquet_file": write_parquet(folder, tmp_path / "t.parquet")},
        "webdataset": {"shards": write_shards(folder, tmp_path / "shards")},
    }
    for kind, keys in positions.items():
        settings = source("p", kind, tmp_path / "vae", dataset_type="prompts", **keys)
        data, counts, _ = prepared(settings, tmp_path / kind, images=False)
        texts = {line for text in captions_of(data, 10).values() for line in text.split("\n")}
        assert {" ".join(text.split()) for text in texts} <= {
            *wanted,
            *(" ".join(t.split()) for _, _, t in rows(folder)),
        }
        assert counts.used >= 6
    assert prompts("x", prompts_file=tmp_path / "t.csv").caption_column == ()


# -- shards ------------------------------------------------------------------------------------------------------------


def test_the_intact_part_of_a_damaged_shard_is_used(tmp_path):
    folder = write_folder(tmp_path / "set", 12)
    shards = write_shards(folder, tmp_path / "shards")
    cut, torn = shards / "shard-000.tar", shards / "shard-001.tar"
    with tarfile.open(cut) as archive:
        last = [member for member in archive.getmembers() if not member.name.endswith(".txt")][-1]
    cut.write_bytes(cut.read_bytes()[: last.offset_data + 10])
    with tarfile.open(torn) as archive:
        third = archive.getmembers()[4]
    data = bytearray(torn.read_bytes())
    data[third.offset : third.offset + 512] = b"\xaa" * 512
    torn.write_bytes(data)
    (shards / "shard-003.tar").write_bytes(b"\x1f\x8bgz")
    (shards / "shard-004.tar").write_bytes(b"")
    _, counts, _ = prepared(source("t", "webdataset", tmp_path / "vae", shards=shards), tmp_path)
    assert counts.used == 3 + 2 + 4
    assert "cut short" in counts.quarantined["shard-000.tar"]
    assert "damaged at byte" in counts.quarantined["shard-001.tar"]
    assert "2 images before that are used" in counts.quarantined["shard-001.tar"]
    assert "compressed" in counts.quarantined["shard-003.tar"]
    assert "empty" in counts.quarantined["shard-004.tar"]


def test_tar_members_that_are_no_samples_or_no_captions_are_reported(tmp_path):
    folder = fill(tmp_path / "set", SIZES)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for number, (name, beside, text) in enumerate(
            [
                ("./a/0.png", ".json", b'{"text": ["x", "y"]}'),
                ("1.png", ".json", b"{"),
                ("2.png", ".txt", b"\xff\xfe\xfa"),
            ]
        ):
            add(archive, name, (folder / f"00{number}.png").read_bytes())
            add(archive, name.replace(".png", beside), text)
        add(archive, "._0.png", b"of a Mac")
        add(archive, "readme.md", b"text")
        add(archive, "3.png", b"no image")
    data, counts, _ = prepared(source("t", "webdataset", tmp_path / "vae", shards=tmp_path / "s.tar"), tmp_path)
    assert set(captions_of(data, 4).items()) <= {("t/a/0.png#0", "x"), ("t/a/0.png#1", "y")}
    assert counts.used == 1
    assert set(counts.quarantined) == {"1.png", "2.png", "3.png"}
    assert "its .json is not JSON (line 1" in counts.quarantined["1.png"]


# -- the keys that users bring along -----------------------------------------------------------------------------------


def test_keys_of_other_tools_are_read(tmp_path):
    pair = Pair(tmp_path)
    (tmp_path / "t.csv").write_text("link,words\nimages/a.png,a\n")
    (tmp_path / "meta.jsonl").write_text('{"id": "a", "tags": "a"}')
    table = {
        "path": "meta.jsonl",
        "filename_column": "id",
        "caption_column": "tags",
        "identifier_includes_extension": False,
    }
    pair.data = [
        {"id": "one", "type": "csv", "csv_file": "t.csv", "csv_url_column": "link", "csv_caption_column": "words"},
        {"id": "two", "instance_data_dir": "images", "caption_strategy": "jsonl", "parquet": table},
    ]
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 0, result.output
    text = said(result.output)
    assert "data.one.csv_url_column is read as image_column" in text
    assert "data.two.parquet is read as caption_column, filename_column, metadata_file" in text
