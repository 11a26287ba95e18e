"""Sources that can only be read in their order: the same batches, one pass for the latents, no more after a kill."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distill.core.data.cache.cache_builder import latent_descriptor
from distill.core.data.cache.encode import WorkerShard
from distill.core.data.cache.encode_sequential import SequentialEncoder
from distill.core.data.cache.tensor_cache import TensorCache
from distill.core.data.index import sequential
from distill.core.data.samples.images import probe
from distill.core.plugin_api.backend import SequentialChunk
from distill.core.utils.progress import lines
from support.data_helpers import FakeFamily, entry, fill, pipeline, take
from test_data_pipeline import MIXED, by_position
from test_data_samples import Memory

GROUP = 2


class Tape(Memory):
    """Memory that can only be wound forward; `given` are the positions that it has delivered, over all readers."""

    name = "tape"
    given: list[int] = []
    missing: set[int] = set()

    @property
    def in_order(self):
        return True

    def samples(self, *, images=True):
        names = list(self.data)
        for chunk in super().samples(images=images):
            columns = {"positions": [str(names.index(name.removeprefix("place/"))) for name in chunk.positions]}
            sizes = [probe(io.BytesIO(self.data[key][0])) for key in chunk.keys]
            columns |= {"widths": [width for width, _ in sizes], "heights": [height for _, height in sizes]}
            yield replace(chunk, **columns)

    def sequential(self, resume=""):
        names = list(self.data)
        for start in range(int(resume or 0), len(names), GROUP):
            positions = [
                position for position in range(start, min(start + GROUP, len(names))) if position not in self.missing
            ]
            self.given.extend(positions)
            openers = [lambda data=self.data[names[position]][0]: io.BytesIO(data) for position in positions]
            yield SequentialChunk(positions, openers, start + GROUP, str(start + GROUP))

    def open(self, key):
        raise AssertionError("a tape is not opened in the middle")


@pytest.fixture
def tape(tmp_path, monkeypatch):
    """A folder of images and a tape of the same in another order, with a resume point at every position."""
    folder = fill(tmp_path / "set", MIXED)
    (folder / "003.txt").write_text("one\ntwo")
    paths = sorted(folder.glob("*.png"))
    order = np.random.default_rng(0).permutation(len(paths))
    data = {
        paths[i].name: (paths[i].read_bytes(), paths[i].with_suffix(".txt").read_text().splitlines()) for i in order
    }
    for name, value in {"data": data, "given": [], "extra": [], "missing": set()}.items():
        monkeypatch.setattr(Tape, name, value)
    monkeypatch.setattr(sequential, "RESUME_POINT_EVERY", 1)
    monkeypatch.setattr(sequential, "LEAP", 2)
    return SimpleNamespace(folder=folder, monkeypatch=monkeypatch)


def use_tape(tape) -> None:
    tape.monkeypatch.setattr("support.data_helpers.REGISTRY", SimpleNamespace(get=lambda kind, name: Tape))


def settings(tape, where, **more):
    return entry(tape.folder, cache_dir_vae=where, write_batch_size=3, **more)


def test_a_sequential_source_gives_the_batches_of_files(tape, tmp_path):
    files, _ = pipeline(settings(tape, tmp_path / "f", random_flip=True), root=tmp_path / "1")
    expected, images = by_position([take(files, 15)]), files.real_images(7, 16, 16)
    use_tape(tape)
    family = FakeFamily()
    data, _ = pipeline(settings(tape, tmp_path / "t", random_flip=True), root=tmp_path / "2", family=family)
    assert by_position([take(data, 15)]) == expected
    assert data.fingerprint() == files.fingerprint()
    assert Tape.given == sorted(Tape.given) == list(range(len(MIXED))), "one pass for the latents"
    assert family.num_images == 2 * len(MIXED)
    assert torch.equal(data.real_images(7, 16, 16), images)


def test_few_real_images_are_read_from_the_nearest_resume_points(tape, tmp_path):
    use_tape(tape)
    data, _ = pipeline(settings(tape, tmp_path / "t"), root=tmp_path)
    data.prepare()
    Tape.given.clear()
    data.real_images(2, 16, 16)
    assert len(Tape.given) <= 2 * GROUP


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_interrupted_build_is_resumed_from_its_resume_points(tape, tmp_path, calls):
    use_tape(tape)
    whole, _ = pipeline(settings(tape, tmp_path / "w"), root=tmp_path / "1")
    expected = by_position([take(whole, 15)])
    Tape.given.clear()
    broken, _ = pipeline(settings(tape, tmp_path / "b"), root=tmp_path / "2", family=FakeFamily(fail_after=calls))
    with pytest.raises(KeyboardInterrupt):
        broken.prepare()
    Tape.given.clear()
    family = FakeFamily()
    again, _ = pipeline(settings(tape, tmp_path / "b"), root=tmp_path / "2", family=family)
    assert by_position([take(again, 15)]) == expected
    first = min(Tape.given)
    assert family.num_images < len(MIXED) or calls < 3
    assert first > 0 or calls < 3, "what is encoded already is not read again"


def test_two_processes_encode_each_image_once(tape, tmp_path):
    use_tape(tape)
    data, _ = pipeline(settings(tape, tmp_path / "t", random_flip=True), root=tmp_path, images=True)
    (dataset,) = data._indexed()
    families = [FakeFamily(), FakeFamily()]
    caches = [TensorCache(tmp_path / "t", latent_descriptor(family, "set"), label="x") for family in families]
    for cache in caches:
        cache.load()
    encoders = [SequentialEncoder(dataset, cache, f, workers=1) for cache, f in zip(caches, families, strict=True)]
    parts = [encoder.own_jobs(encoder.plan(), WorkerShard(rank, 2)) for rank, encoder in enumerate(encoders)]
    for encoder, part in zip(encoders, parts, strict=True):
        encoder.run(part, progress=lines)
    assert sum(family.num_images for family in families) == 2 * len(MIXED)
    assert min(family.num_images for family in families) >= len(MIXED) // 2
    caches[0].load()
    assert not SequentialEncoder(dataset, caches[0], families[0], workers=1).plan()


def test_images_that_the_source_does_not_deliver_are_quarantined(tape, tmp_path):
    use_tape(tape)
    names = list(Tape.data)
    Tape.missing.add(4)
    Tape.data[names[6]] = (Tape.data[names[6]][0][:100], ["half an image"])
    data, _ = pipeline(settings(tape, tmp_path / "t"), root=tmp_path)
    counts = data.prepare().datasets["set"]
    assert set(counts.quarantined) == {names[4], names[6]}
    assert counts.quarantined[names[4]] == "the source did not bring it this time"
    assert counts.used == len(MIXED) - 2
    Tape.missing.clear()
    data, _ = pipeline(settings(tape, tmp_path / "t"), root=tmp_path)
    assert set(data.prepare().datasets["set"].quarantined) == {names[6]}


def test_resume_points_of_another_source_and_incomplete_ones_are_ignored(tmp_path):
    path = tmp_path / "resume-points.jsonl"
    points = sequential.ResumePoints(path, "one")
    points.note(300, "a")
    points.note(310, "too near")
    points.note(600, "b")
    with path.open("a") as stream:
        stream.write('["x", 70')
    assert sequential.ResumePoints(path, "one").before(599) == (300, "a")
    assert sequential.ResumePoints(path, "one").before(600) == (600, "b")
    assert sequential.ResumePoints(path, "one").before(299) == (0, "")
    assert sequential.ResumePoints(path, "two").before(10_000) == (0, "")
