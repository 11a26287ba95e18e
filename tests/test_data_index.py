"""Building indexes: resumable at any moment, byte for byte as without a break, in bounded memory."""

import hashlib
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from distill.core.data.index import index_builder, listing
from distill.core.data.index.build_folder import build_folder_of
from distill.core.data.index.index_builder import IndexBuilder
from distill.core.data.samples.captions import CaptionRules
from distill.core.data.tables import external_sort
from distill.core.errors import OutOfReach
from distill.core.plugin_api.backend import Entry, SampleChunk
from distill.core.utils.progress import default_progress
from distill.data_backends.local import LocalBackend
from support.data_helpers import entry, fill
from support.forks import ended
from test_data_samples import Memory, load

SIZES = [(8, 8), (16, 8), (8, 16)] * 40


class Counting(LocalBackend):
    """Counts the images that are opened, and goes out of reach when there were enough."""

    limit = 10**9

    def __init__(self, config):
        super().__init__(config)
        self.opened = []

    def open(self, key):
        if key.endswith(".png"):
            if len(self.opened) >= self.limit:
                raise OutOfReach("the shelf", "no answer")
            self.opened.append(key)
        return super().open(key)


@pytest.fixture
def small(monkeypatch):
    """Runs, merges and saved rows have a few rows each, so that small sets use them all."""
    monkeypatch.setattr(external_sort, "RUN_ROWS", 16)
    monkeypatch.setattr(external_sort, "SMALLEST_BATCH", 4)
    monkeypatch.setattr(external_sort, "MERGE_ROWS", 4)
    monkeypatch.setattr(listing, "RUN_ROWS", 16)
    monkeypatch.setattr(listing, "CHUNK", 8)
    monkeypatch.setattr(index_builder, "CHUNK", 8)
    monkeypatch.setattr(index_builder, "READ_ROWS", 8)


def build(path, settings, backend):
    builder = IndexBuilder(
        "set", backend, CaptionRules(settings), workers=2, progress=default_progress()
    )  # fmt: skip
    return builder.build(path), builder


def files(folder, **settings):
    return entry(folder, **settings), Counting(LocalBackend.Config(instance_data_dir=folder))


def same_bytes(one: Path, two: Path) -> bool:
    return hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest()


def test_rows_come_out_as_they_went_in_whatever_their_order(tmp_path, small):
    folder = fill(tmp_path / "a" / "set", SIZES)
    (folder / "003.png").write_bytes(b"no image")
    (folder / "004.txt").unlink()
    (folder / "5").mkdir()
    (folder / "007.png").rename(folder / "5" / "007.png")
    (folder / "008.old.png").write_bytes((folder / "008.png").read_bytes())
    index, builder = build(tmp_path / "i.arrow", *files(folder))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert [index.key(row) for row in range(len(index))] == names
    assert builder.num_read == len(names) == 121
    problems = {index.key(row): index.problem(row) for row in range(len(index)) if index.problem(row)}
    nothing = "it has no caption"
    assert problems == {
        "003.png": "it is in no image format that can be read", "004.png": nothing, "5/007.png": nothing,
        "008.old.png": nothing,
    }  # fmt: skip
    for row, name in enumerate(names):
        if name not in problems:
            number = int(name[:3])
            assert (index.width[row], index.height[row]) == SIZES[number]
            assert index.caption(int(index.caption_offsets[row])) == f"image number {number}"
    assert not build_folder_of(tmp_path / "i.arrow").exists()


def test_files_read_before_an_outage_are_not_read_again(tmp_path, small):
    folder = fill(tmp_path / "set", SIZES)
    settings, backend = files(folder)
    build(tmp_path / "whole.arrow", settings, backend)
    assert len(backend.opened) == 120
    settings, backend = files(folder)
    backend.limit = 108
    with pytest.raises(OutOfReach):
        build(tmp_path / "broken.arrow", settings, backend)
    assert not (tmp_path / "broken.arrow").exists()
    settings, backend = files(folder)
    build(tmp_path / "broken.arrow", settings, backend)
    assert 12 <= len(backend.opened) <= 14  # at most those that were under way in other threads come again
    assert same_bytes(tmp_path / "whole.arrow", tmp_path / "broken.arrow")
    assert not build_folder_of(tmp_path / "broken.arrow").exists()


def test_other_rules_for_captions_open_no_image(tmp_path, small):
    folder = fill(tmp_path / "set", SIZES[:20])
    build(tmp_path / "i.arrow", *files(folder))
    settings, backend = files(folder, caption_filter_list=("image",))
    index, builder = build(tmp_path / "i.arrow", settings, backend)
    assert (builder.num_read, backend.opened) == (20, [])
    assert index.caption(0) == "number 0"
    other, _ = build(tmp_path / "j.arrow", settings, backend)
    assert same_bytes(index.path, other.path)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_data_index as t
from distill.core.data.index import index_builder
index_builder.READ_ROWS = 8
root = Path(sys.argv[2])
settings, backend = t.files(root / "set")
read = type(backend).open
def killed(self, key):
    if len(self.opened) == 108:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, key)
t.Counting.open = killed
t.build(root / "killed.arrow", settings, backend)
"""


def test_a_build_killed_at_nine_tenths_is_resumed(tmp_path):
    folder = fill(tmp_path / "set", SIZES)
    here = Path(__file__).parent
    done = ended("-c", KILLED, here, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    settings, backend = files(folder)
    killed, builder = build(tmp_path / "killed.arrow", settings, backend)
    assert len(backend.opened) == builder.num_read
    assert 12 <= builder.num_read <= 12 + 2 * 8  # chunks of eight were kept whole
    whole, _ = build(tmp_path / "whole.arrow", *files(folder))
    assert same_bytes(killed.path, whole.path)
    assert not build_folder_of(killed.path).exists()


# -- samples -----------------------------------------------------------------------------------------------------------


class Shards(Memory):
    """Samples whose listing can go on behind any chunk; it breaks off at a chosen chunk."""

    breaks_at = None
    listed = 0

    def samples(self, *, images=True):
        yield from self._tell(0)

    def samples_after(self, resume):
        yield from self._tell(int(resume))

    def _tell(self, start):
        for number, chunk in enumerate(super().samples()):
            if number < start:
                continue
            if number == self.breaks_at:
                raise OutOfReach("the shelf", "no answer")
            type(self).listed += 1
            yield SampleChunk(**{**vars(chunk), "resume": str(number + 1)})


def test_an_interrupted_listing_is_resumed(tmp_path, small, monkeypatch):
    for name in ("data", "opened", "extra"):
        monkeypatch.setattr(Memory, name, type(getattr(Memory, name))())
    folder = fill(tmp_path / "set", SIZES[:60])
    load(Memory, folder)
    settings = entry(folder)
    whole, _ = build(tmp_path / "whole.arrow", settings, Memory(None))
    chunks = 60 // 3
    monkeypatch.setattr(Shards, "breaks_at", 15)
    with pytest.raises(OutOfReach):
        build(tmp_path / "broken.arrow", settings, Shards(None))
    monkeypatch.setattr(Shards, "breaks_at", None)
    broken, _ = build(tmp_path / "broken.arrow", settings, Shards(None))
    assert Shards.listed == chunks
    assert same_bytes(whole.path, broken.path)
    assert not build_folder_of(broken.path).exists()


def test_a_broken_sample_does_not_make_every_start_list_again(tmp_path, monkeypatch):
    for name in ("data", "opened", "extra"):
        monkeypatch.setattr(Memory, name, type(getattr(Memory, name))())
    folder = fill(tmp_path / "set", SIZES[:6])
    load(Memory, folder)
    Memory.data["002.png"] = (b"no image", ["x"])
    settings = entry(folder)
    build(tmp_path / "i.arrow", settings, Memory(None))
    Memory.opened.clear()
    _, builder = build(tmp_path / "i.arrow", settings, Memory(None))
    assert (builder.num_read, Memory.opened) == (0, [])
    gone = Memory.data.pop("003.png")
    Memory.data["003.png"] = gone
    monkeypatch.setattr(Memory, "stamp", "2")
    index, builder = build(tmp_path / "i.arrow", settings, Memory(None))
    assert Memory.opened == ["002.png"]
    assert index.problem(2)


# -- tables larger than memory -----------------------------------------------------------------------------------------


def test_on_disk_columns_equal_the_appended_ones(tmp_path):
    schema = pa.schema(
        [
            ("text", pa.large_string()), ("number", pa.int32()), ("hash", pa.binary(3)),
            ("many", pa.large_list(pa.large_string())), ("hashes", pa.large_list(pa.binary(1))),
        ]
    )  # fmt: skip
    rows = [
        {
            "text": "x" * n,
            "number": n,
            "hash": b"%03d" % n,
            "many": ["\u00fc", "", "abc"][: n % 4],
            "hashes": [b"a"] * n,
        }
        for n in range(9)
    ]
    whole = pa.RecordBatch.from_pylist(rows, schema)
    pieces = [whole.slice(0, 4), whole.slice(4, 0), whole.slice(4, 5)]
    table = external_sort.OnDiskTable(schema, tmp_path).extend(pieces).table()
    assert table.to_pylist() == rows
    assert all(column.num_chunks == 1 for column in table.columns)
    assert external_sort.OnDiskTable(schema, tmp_path).table().to_pylist() == []


def test_the_external_sort_merges_runs_in_order(tmp_path, small):
    schema = pa.schema([("key", pa.large_string()), ("position", pa.large_string())])
    random = np.random.default_rng(0)
    pairs = [(f"{a}\u00e9" if a % 2 else f"{a}z", str(b)) for a, b in random.integers(0, 60, (500, 2)).tolist()]
    batches = [
        pa.RecordBatch.from_pydict({"key": [k for k, _ in part], "position": [p for _, p in part]}, schema=schema)
        for part in (pairs[start : start + 7] for start in range(0, 500, 7))
    ]
    table = external_sort.sorted_table(iter(batches), ["key", "position"], schema, tmp_path)
    assert list(zip(table["key"].to_pylist(), table["position"].to_pylist(), strict=True)) == sorted(pairs)
    part = external_sort.between(table, "key", "20", "30z")
    assert part["key"].to_pylist() == [key for key, _ in sorted(pairs) if "20" <= key <= "30z"]


def test_listing_and_building_hold_no_object_per_file(tmp_path):
    """Neither the peak of the Python heap nor what Arrow holds grows with the number of files."""
    import tracemalloc

    class Endless(LocalBackend):
        count = 0

        def list(self):
            for number in range(self.count):
                yield Entry(f"{number:09d}.png", 1, "v")

        def open(self, key):
            raise FileNotFoundError(2, "gone")

    def peak(count):
        settings = entry(tmp_path / "set", caption_strategy="filename")
        backend = Endless(LocalBackend.Config(instance_data_dir=tmp_path))
        backend.count = count
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        index, _ = build(tmp_path / f"{count}.arrow", settings, backend)
        assert len(index) == count
        held = tracemalloc.get_traced_memory()[1], pa.total_allocated_bytes() - before
        tracemalloc.stop()
        return held

    (small_heap, _), (large_heap, left) = peak(4_000), peak(12_000)
    assert large_heap < 1.3 * small_heap + 2**20
    assert left < 2**20
