"""Backends that know their samples: the same batches as from files of the same names."""

import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from distill.core.errors import BadValue, UserError
from distill.core.plugin_api.backend import DataBackend, SampleBackend, SampleChunk
from support.data_helpers import FakeFamily, entry, fill, pipeline, take
from test_data_pipeline import MIXED, by_position


class Memory(SampleBackend):
    """Images and captions in a dict; `opened` tells which were asked for."""

    name = "memory"
    data: dict[str, tuple[bytes, list[str]]] = {}
    stamp = "1"
    extra: list[tuple[str, str]] = []
    opened: list[str] = []

    @property
    def location(self) -> str:
        return "memory"

    def identity(self) -> str:
        return self.stamp

    def samples(self, *, images: bool = True) -> Iterator[SampleChunk]:
        if not self.data:
            raise BadValue("memory_key", "x", "holds nothing", "fill it")
        rows = [*((key, key) for key in reversed(self.data)), *self.extra]
        for start in range(0, len(rows), 3):
            part = rows[start : start + 3]
            size, zeros = len(part), [0] * len(part)
            yield SampleChunk(
                [key for key, _ in part], [f"place/{place}" for _, place in part], zeros, ["v"] * size,
                [self.data[place][1] for _, place in part], zeros, zeros, [""] * size,
            )  # fmt: skip

    def open(self, key: str) -> BinaryIO:
        place = key.removeprefix("place/")
        self.opened.append(place)
        return io.BytesIO(self.data[place][0])


@pytest.fixture
def memory(monkeypatch):
    """A registry that knows the backend, and the backend, empty."""
    registry = SimpleNamespace(get=lambda kind, name: Memory)
    monkeypatch.setattr("support.data_helpers.REGISTRY", registry)
    monkeypatch.setattr(Memory, "data", {})
    monkeypatch.setattr(Memory, "opened", [])
    monkeypatch.setattr(Memory, "extra", [])
    return Memory


def load(backend: type[Memory], folder) -> None:
    backend.data = {
        path.name: (path.read_bytes(), path.with_suffix(".txt").read_text().splitlines())
        for path in sorted(folder.glob("*.png"))
    }


def test_samples_give_the_batches_of_files(tmp_path, memory, monkeypatch):
    folder = fill(tmp_path / "set", MIXED)
    (folder / "003.txt").write_text("one\ntwo")
    load(memory, folder)
    samples, _ = pipeline(entry(folder, cache_dir_vae=tmp_path / "other"), root=tmp_path / "2", micro=2)
    from_samples = by_position([take(samples, 15)])
    monkeypatch.undo()
    files, _ = pipeline(entry(folder), root=tmp_path / "1", micro=2)
    assert by_position([take(files, 15)]) == from_samples
    assert files.fingerprint() == samples.fingerprint()


def test_nothing_is_read_again_until_it_changes(tmp_path, memory, monkeypatch):
    folder = fill(tmp_path / "set", MIXED)
    load(memory, folder)
    pipeline(entry(folder), root=tmp_path)[0].prepare()
    memory.opened.clear()
    pipeline(entry(folder), root=tmp_path)[0].prepare()
    assert not memory.opened
    monkeypatch.setattr(memory, "stamp", "2")  # the source may have changed: its images say that they have not
    (key, (data, _)), *_ = memory.data.items()
    memory.data[key] = (data, ["another caption"])
    family = FakeFamily()
    pipeline(entry(folder), root=tmp_path, family=family)[0].prepare()
    assert not memory.opened
    assert family.prompts == ["another caption"]


def test_a_repeated_name_is_quarantined(tmp_path, memory):
    folder = fill(tmp_path / "set", MIXED)
    load(memory, folder)
    memory.extra = [("002.png", "004.png")]
    data, _ = pipeline(entry(folder), root=tmp_path)
    counts = data.prepare().datasets["set"]
    assert counts.quarantined == {"002.png": "another sample has the same name"}
    assert counts.used == 10


def test_a_source_that_cannot_be_read_is_a_user_error(tmp_path, memory):
    with pytest.raises(UserError, match=r"data\.set\.memory_key = 'x': holds nothing"):
        pipeline(entry(fill(tmp_path / "set", MIXED)), root=tmp_path)[0].prepare()
    with pytest.raises(UserError, match="memory is only read"):
        Memory(None).write("a", b"")


def test_captions_alone_open_no_image(tmp_path, memory):
    folder = fill(tmp_path / "set", MIXED)
    load(memory, folder)
    memory.data["000.png"] = (b"", ["first", "second"])
    from support.data_helpers import prompts

    folder.joinpath("x.txt").write_text("never read")
    data, _ = pipeline(prompts("p", instance_data_dir=folder), root=tmp_path, images=False)
    data.prepare()
    assert data.num_samples == 11
    keys = {key for step in take(data, 11) for batch in step for key in batch.keys}
    assert {"p/000.png#0", "p/000.png#1", "p/001.png"} <= keys
    assert not memory.opened


def test_a_file_backend_is_no_sample_backend():
    from distill.data_backends.local import LocalBackend

    assert issubclass(Memory, DataBackend)
    assert not issubclass(LocalBackend, SampleBackend)
