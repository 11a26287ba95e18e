"""From a folder to batches: counts, caches, order, time ids, hostile files."""

import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from distill.core.errors import DistillError, UserError
from PIL import Image
from support.data_helpers import FakeFamily, entry, fill, image, pipeline, take
from support.forks import ended

MIXED = [(32, 32)] * 5 + [(64, 32)] * 3 + [(32, 64)] * 2


def by_position(steps_of_each_rank):
    """position -> what a sample is and what was drawn for it, per step, over ranks and micro-batches."""
    joined = []
    for step in zip(*steps_of_each_rank, strict=True):
        found = {}
        for batch in itertools.chain(*step):
            for row, position in enumerate(batch.positions):
                found[position] = (
                    batch.keys[row], batch.captions[row], batch.latents[row].tolist(),
                    {name: value[row].tolist() for name, value in batch.cond.items()},
                )  # fmt: skip
        joined.append(dict(sorted(found.items())))
    return joined


def test_batches_carry_latents_embeddings_and_sizes(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    family = FakeFamily()
    data, _ = pipeline(entry(folder), root=tmp_path, family=family, micro=2)
    report = data.prepare()
    assert report.images_encoded == report.captions_encoded == data.num_samples == 10
    assert family.released == 2  # the text encoders before the autoencoder comes, and that one afterwards
    assert data.steps_per_epoch() == 5
    for batches in take(data, 10):
        (batch,) = batches
        width, height = Image.open(folder / Path(batch.keys[0]).name).size
        assert batch.latents.shape == (2, 3, batch.cond["time_ids"][0, 4] // 8, batch.cond["time_ids"][0, 5] // 8)
        assert batch.cond["time_ids"].dtype == torch.float32
        assert batch.cond["time_ids"][0, :2].tolist() == [height, width]
        assert batch.captions[0] == f"image number {int(Path(batch.keys[0]).stem)}"
        assert torch.equal(batch.cond["pooled"], FakeFamily().encode_prompts(list(batch.captions))["pooled"])
        if (width, height) == (32, 32):
            pixels = np.asarray(Image.open(folder / Path(batch.keys[0]).name)).astype(np.float32) / 127.5 - 1
            mean = torch.from_numpy(pixels).permute(2, 0, 1).unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))
            assert (batch.latents[0] - mean).abs().max() < 0.06  # the posterior's noise has deviation 0.01


def test_counts_are_exact_over_datasets_buckets_repeats_and_probability(tmp_path):
    one = entry(fill(tmp_path / "one", MIXED), repeats=1)
    two = entry(fill(tmp_path / "two", [(32, 32)] * 6), probability=0.5)
    data, _ = pipeline(one, two, root=tmp_path, micro=4)
    data.prepare()
    epochs = 4
    steps = data.steps_per_epoch() * epochs
    assert steps == epochs * (20 + 3) / 4
    counts = Counter(key for batches in take(data, round(steps)) for batch in batches for key in batch.keys)
    assert {key.split("/")[0]: count for key, count in counts.items()} == {"one": 8, "two": 2}
    assert len(counts) == 16
    assert set(counts.values()) == {8, 2}


def test_how_the_batch_is_cut_changes_nothing(tmp_path):
    settings = {"random_flip": True, "caption_dropout_probability": 0.3}
    folder = fill(tmp_path / "set", MIXED)
    for text in folder.glob("*.txt"):
        text.write_text(text.read_text() + "\nanother\na third")
    cut = []
    for micro, accumulation, world in ((4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)):
        ranks = []
        for rank in range(world):
            data, _ = pipeline(
                entry(folder, **settings), root=tmp_path, micro=micro, accumulation=accumulation, rank=rank, world=world
            )
            data.prepare()
            ranks.append(take(data, 12))
            assert all(len(batches) == accumulation for batches in ranks[-1])
        cut.append(by_position(ranks))
    assert all(each == cut[0] for each in cut[1:])
    assert [list(step) for step in cut[0]] == [[0, 1, 2, 3]] * 12
    samples = [sample for step in cut[0] for sample in step.values()]
    assert {key.partition("#")[2] for key, *_ in samples} == {"0", "1", "2"}
    dropped = [not any(cond["pooled"]) for *_, cond in samples]
    assert 3 <= sum(dropped) <= 30
    assert all(cond["time_ids"][0] >= 32 for *_, cond in samples)  # the sizes stay when the caption is dropped


def test_a_restart_in_the_middle_gives_the_same_batches(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    data, _ = pipeline(entry(folder, random_flip=True), root=tmp_path, micro=2)
    data.prepare()
    whole = by_position([take(data, 17)])
    again, _ = pipeline(entry(folder, random_flip=True), root=tmp_path, micro=2)
    again.prepare()
    assert by_position([take(again, 10, start=7)]) == whole[7:]
    assert again.fingerprint() == data.fingerprint()
    other, _ = pipeline(entry(folder, random_flip=True), root=tmp_path, micro=2, seed=2)
    assert by_position([take(other, 17)]) != whole
    assert other.fingerprint() != data.fingerprint()


def test_the_same_data_elsewhere_is_the_same_data(tmp_path):
    first, _ = pipeline(entry(fill(tmp_path / "here" / "set", MIXED)), root=tmp_path / "1", micro=2)
    second, _ = pipeline(entry(fill(tmp_path / "there" / "set", MIXED)), root=tmp_path / "2", micro=2)
    assert by_position([take(first, 5)]) == by_position([take(second, 5)])
    assert first.fingerprint() == second.fingerprint()
    fill(tmp_path / "there" / "set", [(32, 32)], start=77)
    third, _ = pipeline(entry(tmp_path / "there" / "set"), root=tmp_path / "2", micro=2)
    assert third.fingerprint() != first.fingerprint()


# -- time ids ----------------------------------------------------------------------------------------------------------


CORNER = {
    "crop": True, "crop_style": "corner", "crop_aspect": "square", "random_flip": True, "resolution_type": "pixel",
    "maximum_image_size": 40, "target_downsample_size": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        # original height and width, top and left of the crop, target height and width; the image is 40 high, 120 wide
        ("actual", {(40, 120, 0, 0, 32, 32), (40, 120, 0, 88, 32, 32)}),
        ("crop_only", {(32, 32, 0, 0, 32, 32), (32, 32, 0, 88, 32, 32)}),
        ("plain", {(32, 32, 0, 0, 32, 32)}),
    ],
)
def test_micro_conditioning_decides_the_time_ids_and_nothing_else(tmp_path, told, expected):
    folder = fill(tmp_path / "set", [(120, 40)] * 3)
    usual, _ = pipeline(entry(folder, **CORNER, caption_dropout_probability=0.3), root=tmp_path, micro=2)
    usual.prepare()
    settings = entry(folder, **CORNER, caption_dropout_probability=0.3, micro_conditioning=told)
    data, _ = pipeline(settings, root=tmp_path, micro=2)
    report = data.prepare()
    assert report.images_encoded == report.captions_encoded == 0, "caches do not depend on it"
    batches = by_position([take(data, 16)])
    assert {tuple(cond["time_ids"]) for step in batches for *_, cond in step.values()} == expected
    for ours, theirs in zip(batches, by_position([take(usual, 16)]), strict=True):
        for (*same, cond), (*as_usual, other) in zip(ours.values(), theirs.values(), strict=True):
            assert same == as_usual
            assert {**cond, "time_ids": 0} == {**other, "time_ids": 0}
    again, _ = pipeline(settings, root=tmp_path, micro=2)
    assert by_position([take(again, 9, start=7)]) == batches[7:]
    assert again.fingerprint() == data.fingerprint()
    assert (data.fingerprint() == usual.fingerprint()) == (told == "actual"), "a run goes on with what it began with"


def test_sizes_told_are_those_of_each_bucket(tmp_path):
    data, _ = pipeline(entry(fill(tmp_path / "set", MIXED), micro_conditioning="plain"), root=tmp_path, micro=2)
    for (batch,) in take(data, 10):
        height, width = (8 * edge for edge in batch.latents.shape[2:])
        assert batch.cond["time_ids"].tolist() == [[height, width, 0, 0, height, width]] * 2


def test_time_ids_after_a_flip_count_from_the_other_side(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    ramp = np.zeros((40, 120, 3), np.uint8)
    ramp[..., 0] = np.arange(120)[None] * 2
    Image.fromarray(ramp).save(folder / "ramp.png")
    (folder / "ramp.txt").write_text("a ramp")
    data, _ = pipeline(entry(folder, **CORNER), root=tmp_path, micro=1)
    seen = {}
    for (batch,) in take(data, 24):
        top, left = batch.cond["time_ids"][0, 2:4].tolist()
        seen.setdefault((top, left), batch.latents[0, 0].mean(0))
    assert set(seen) == {(0.0, 0.0), (0.0, 88.0)}  # the resized image is 120 wide, the crop 32: 120 - 32 - 0
    plain, mirrored = seen[0.0, 0.0], seen[0.0, 88.0]
    assert plain.diff().gt(0).all()
    assert (mirrored - plain.flip(0)).abs().max() < 0.1
    original = [batch.cond["time_ids"][0].tolist() for (batch,) in take(data, 1)]
    assert original[0][:2] == [40, 120]
    assert original[0][4:] == [32, 32]


# -- caches ------------------------------------------------------------------------------------------------------------


def test_a_second_run_encodes_nothing(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    pipeline(entry(folder), root=tmp_path)[0].prepare()
    family = FakeFamily()
    data, lines = pipeline(entry(folder), root=tmp_path, family=family)
    data.prepare()
    assert not family.prompts
    assert not family.batches
    assert not family.released
    assert any("everything was cached" in line for line in lines)


def test_equal_sizes_share_encoder_calls(tmp_path):
    family = FakeFamily()
    pipeline(entry(fill(tmp_path / "set", [(32, 32)] * 70 + [(64, 32)] * 3)), root=tmp_path, family=family)[0].prepare()
    assert sorted(family.batches) == [(3, 3, 24, 48), (6, 3, 32, 32), (64, 3, 32, 32)]


def test_changed_settings_encode_anew_and_say_why(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    pipeline(entry(folder), root=tmp_path)[0].prepare()

    def run(family=None, **settings):
        family = family or FakeFamily()
        data, lines = pipeline(entry(folder, **settings), root=tmp_path, family=family)
        data.prepare()
        return family.num_images, len(family.prompts), " ".join(lines)

    images, prompts, said = run(resolution=48)
    assert (images, prompts) == (10, 0)
    assert "latents of 'set': resolution 32.0 -> 48.0, so 10 images are encoded anew" in said
    assert run(resolution=32)[:2] == (0, 0)  # the earlier ones were kept
    assert run(crop=True)[0] == 5  # only the images that the setting changes
    assert run(minimum_image_size=40)[:2] == (0, 0)  # a filter changes no pixels
    images, prompts, said = run(FakeFamily(vae="v2"))
    assert (images, prompts) == (10, 0)
    assert "the autoencoder is another one" in said
    images, prompts, said = run(FakeFamily(text="t2"))
    assert (images, prompts) == (0, 10)
    assert "the text encoders have changed" in said

    run()
    image(32, 32, 99).save(folder / "000.png")
    (folder / "001.txt").write_text("something else")
    image(32, 32, 98).save(folder / "new.png")
    (folder / "new.txt").write_text("something else")
    (folder / "002.png").unlink()
    images, prompts, said = run()
    assert (images, prompts) == (2, 1)
    assert "10 of 10 images" in said


def test_one_text_cache_serves_all_datasets(tmp_path):
    one, two = fill(tmp_path / "one", [(32, 32)] * 3), fill(tmp_path / "two", [(32, 32)] * 3)
    family = FakeFamily()
    pipeline(entry(one), entry(two), root=tmp_path, family=family)[0].prepare()
    assert len(family.prompts) == 3  # the same three captions


def test_a_damaged_shard_is_found_and_made_anew(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    settings = entry(folder, write_batch_size=2)
    first, _ = pipeline(settings, root=tmp_path)
    before = by_position([take(first, 10)])
    shards = sorted((tmp_path / "cache" / "set").rglob("*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[-40] ^= 1
    shards[0].write_bytes(data)
    family = FakeFamily()
    again, lines = pipeline(settings, root=tmp_path, family=family)
    report = again.prepare()
    assert report.damaged_shards == 1
    assert family.num_images in (1, 2)
    assert any("is damaged (its checksum is wrong)" in line for line in lines)
    assert by_position([take(again, 10)]) == before


def test_an_error_while_reading_reaches_the_loop(tmp_path):
    data, _ = pipeline(entry(fill(tmp_path / "set", MIXED)), root=tmp_path)
    data.prepare()
    for shard in (tmp_path / "cache" / "set").rglob("*.safetensors"):
        stat = shard.stat()
        content = bytearray(shard.read_bytes())
        content[-180:-80] = bytes(100)  # inside the latents, whatever the number of entries
        shard.write_bytes(content)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again, _ = pipeline(entry(tmp_path / "set"), root=tmp_path)
    again.prepare()
    with pytest.raises(DistillError, match="was damaged while the run was using it"):
        take(again, 20)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from support.data_helpers import FakeFamily, entry, pipeline
class Killed(FakeFamily):
    def encode_images(self, pixels, generator=None):
        if len(self.batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_images(pixels, generator)
root = Path(sys.argv[2])
settings = entry(root / "set", write_batch_size=4, vae_batch_size=1, resolution=704)
pipeline(settings, root=root, family=Killed())[0].prepare()
"""


def test_a_killed_build_is_resumed_at_the_first_missing_shard(tmp_path):
    sizes = [(50, 50)] * 10
    broken = fill(tmp_path / "set", sizes) / "001.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    settings = {"write_batch_size": 4, "vae_batch_size": 1, "resolution": 704}
    result = ended("-c", KILLED, Path(__file__).parent, tmp_path)
    assert result.returncode == -signal.SIGKILL
    family = FakeFamily()
    data, _ = pipeline(entry(tmp_path / "set", **settings), root=tmp_path, family=family)
    data.prepare()
    # two calls filled the first shard (one image of it is broken), the third call was lost
    assert family.batches == [(2, 3, 704, 704), (2, 3, 704, 704), (2, 3, 704, 704)]
    assert not family.prompts
    fresh = FakeFamily()
    whole, _ = pipeline(
        entry(tmp_path / "set", **settings, cache_dir_vae=tmp_path / "other"), root=tmp_path, family=fresh
    )
    whole.prepare()
    assert [shape[0] for shape in fresh.batches] == [1, 2, 2, 2, 2]
    assert by_position([take(data, 9)]) == by_position([take(whole, 9)])


# -- hostile files -----------------------------------------------------------------------------------------------------


def test_broken_images_are_named_and_the_run_goes_on(tmp_path):
    folder = fill(tmp_path / "set", [(32, 32)] * 6)
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.JPG").write_text("I am no image")
    whole = (folder / "003.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "deep").mkdir()
    image(32, 32).save(folder / "deep" / "no caption \u00fc.png")
    image(32, 32).save(folder / "latin.png")
    for name in ("zero", "text", "cut"):
        (folder / f"{name}.txt").write_text("broken")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "README.md").write_text("not an image")
    for _ in range(2):  # the second time from the caches
        data, lines = pipeline(entry(folder), root=tmp_path)
        report = data.prepare()
        counts = report.datasets["set"]
        assert set(counts.quarantined) == {"zero.png", "text.JPG", "cut.png", "latin.png", "dangling.png"}
        assert "not UTF-8" in counts.quarantined["latin.png"]
        assert "truncated" in counts.quarantined["cut.png"].lower()
        assert counts.left_out == {"no caption": 1}
        assert (counts.found, counts.used) == (12, 6)
        said = "\n".join(lines)
        assert "5 broken and quarantined" in said
        assert "text.JPG" in said
        listed = (tmp_path / "cache" / "set" / "set.quarantine.txt").read_text()
        assert "cut.png" in listed
        assert len(take(data, 3)) == 3
    (folder / "cut.png").write_bytes(whole)  # mended
    data, _ = pipeline(entry(folder), root=tmp_path)
    assert "cut.png" not in data.prepare().datasets["set"].quarantined
    assert data.num_samples == 7


def test_files_that_were_out_of_reach_are_tried_again(tmp_path, monkeypatch):
    from distill.data_backends.local import LocalBackend

    folder = fill(tmp_path / "set", [(32, 32)] * 4)
    read = LocalBackend.open

    def refuse(self, key):
        if key == "002.png":
            raise PermissionError(13, "Permission denied")
        return read(self, key)

    monkeypatch.setattr(LocalBackend, "open", refuse)
    data, _ = pipeline(entry(folder), root=tmp_path)
    assert data.prepare().datasets["set"].quarantined == {"002.png": "Permission denied"}
    monkeypatch.undo()
    data, _ = pipeline(entry(folder), root=tmp_path)
    assert not data.prepare().datasets["set"].quarantined
    assert data.num_samples == 4


def test_a_resumed_run_keeps_the_samples_that_it_began_with(tmp_path, monkeypatch):
    from distill.data_backends.local import LocalBackend

    folder = fill(tmp_path / "set", [(32, 32)] * 6)
    read, opened = LocalBackend.open, Counter()

    def refuse(self, key):
        opened[key] += 1
        if key == "002.png" or (key == "004.png" and opened[key] > 1):  # its header, but not its pixels
            raise PermissionError(13, "Permission denied")
        return read(self, key)

    monkeypatch.setattr(LocalBackend, "open", refuse)
    first, _ = pipeline(entry(folder), root=tmp_path)
    quarantined = {"002.png": "Permission denied", "004.png": "Permission denied"}
    assert first.prepare().datasets["set"].quarantined == quarantined
    monkeypatch.undo()
    for _ in range(2):
        again, _ = pipeline(entry(folder), root=tmp_path, resumes=True)
        report = again.prepare()
        assert report.datasets["set"].quarantined == quarantined
        assert report.images_encoded == 0
        assert again.fingerprint() == first.fingerprint()
        assert by_position([take(again, 6)]) == by_position([take(first, 6)])
    other, _ = pipeline(entry(folder), root=tmp_path)
    assert not other.prepare().datasets["set"].quarantined
    assert other.num_samples == 6
    assert other.fingerprint() != first.fingerprint()


def test_names_that_are_not_utf8_are_quarantined(tmp_path):
    folder = fill(tmp_path / "set", [(32, 32)] * 2)
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes((folder / "000.png").read_bytes())
    except OSError:
        pytest.skip("the file system refuses such names")
    data, _ = pipeline(entry(folder), root=tmp_path)
    assert data.prepare().datasets["set"].quarantined == {"caf\\xe9.png": "its name is no UTF-8: rename it"}
    assert data.num_samples == 2


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        ({}, {}, ["looked in", "it is empty", "instance_data_dir"]),
        ({"a.md": b"x"}, {}, ["1 other files (a.md", ".jpg"]),
        ({"a.png": b"x", "a.txt": b"y"}, {}, ["1 broken (first: a.png", "no image format"]),
    ],
)
def test_an_empty_dataset_says_what_was_looked_for(tmp_path, files, settings, words):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    data, _ = pipeline(entry(folder, **settings), root=tmp_path)
    with pytest.raises(UserError) as raised:
        data.prepare()
    assert raised.value.exit_code == 2
    for word in ["dataset 'set' has no image to train on", str(folder), *words]:
        assert word in str(raised.value), str(raised.value)


def test_a_dataset_without_usable_images_names_the_filter(tmp_path):
    folder = fill(tmp_path / "set", [(32, 32)] * 3, captions=False)
    for settings, words in (
        ({}, "3 images in .*, none with a caption.*000.txt"),
        ({"caption_strategy": "filename", "minimum_image_size": 99}, "3 smaller than minimum_image_size"),
    ):
        with pytest.raises(UserError, match=words):
            pipeline(entry(folder, **settings), root=tmp_path)[0].prepare()
    with pytest.raises(UserError, match="does not exist"):
        pipeline(entry(tmp_path / "absent"), root=tmp_path)[0].prepare()


def test_limits_are_counted(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    data, lines = pipeline(entry(folder, max_num_samples=4, maximum_aspect_ratio=1.5), root=tmp_path)
    report = data.prepare()
    counts = report.datasets["set"]
    assert report.captions_encoded == 4, "those of images in use alone"
    assert counts.left_out == {"wider than maximum_aspect_ratio": 3, "beyond max_num_samples": 3}
    assert counts.used == data.num_samples == 4
    assert any("fewer than the 10,000" in line for line in lines)


# -- other uses --------------------------------------------------------------------------------------------------------


def test_real_images_and_captions_need_no_encoder(tmp_path):
    family = FakeFamily()
    data, _ = pipeline(entry(fill(tmp_path / "set", MIXED)), root=tmp_path, family=family)
    images = data.real_images(4, 16, 24)
    assert images.shape == (4, 3, 24, 16)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert len(data.real_images(100, 8, 8)) == 10
    assert torch.equal(images, data.real_images(4, 16, 24))
    assert len(set(data.captions(3))) == 3
    assert data.resolution == (32, 32)
    assert not family.prompts
    assert not family.batches


def test_the_loader_takes_little_time(tmp_path):
    data, _ = pipeline(entry(fill(tmp_path / "set", [(32, 32)] * 64)), root=tmp_path, micro=4)
    data.prepare()
    make = data._ready().at
    for step in range(32):
        make(step)
    start = time.process_time()
    for step in range(32, 232):
        make(step)
    assert (time.process_time() - start) / 200 < 2e-3  # seconds per batch of 4


def test_prefetching_stops_when_asked(tmp_path):
    import threading

    data, _ = pipeline(entry(fill(tmp_path / "set", MIXED)), root=tmp_path)
    steps = data.steps(0)
    next(steps)
    assert any(thread.name == "distill-data" for thread in threading.enumerate())
    data.close()
    assert not any(thread.name == "distill-data" for thread in threading.enumerate())


# -- several processes -------------------------------------------------------------------------------------------------


def test_two_processes_share_the_work(tmp_path):
    import threading

    from distill.core.data.cache.cache_builder import CacheBuilder
    from distill.core.data.cache.cache_paths import CachePaths
    from distill.core.data.cache.encode import WorkerShard
    from distill.core.data.report.summary import DataReport
    from distill.core.utils.progress import default_progress

    folder = fill(tmp_path / "set", [(32, 32)] * 12)
    cut = folder / "005.png"
    cut.write_bytes(cut.read_bytes()[:1000])
    barrier, families, used = threading.Barrier(2, timeout=30), [FakeFamily(), FakeFamily()], {}
    settings = entry(folder, write_batch_size=3)
    opened, _ = pipeline(settings, root=tmp_path)
    opened._indexed()
    paths = CachePaths(opened._config, tmp_path / "cache")

    @contextlib.contextmanager
    def synchronized():
        yield
        barrier.wait()

    def work(rank: int) -> None:
        own, _ = pipeline(settings, root=tmp_path)
        datasets = own._indexed()
        builder = CacheBuilder(
            families[rank], paths, shard=WorkerShard(rank, 2), workers=1, progress=default_progress(),
            synchronized=synchronized,
        )  # fmt: skip
        builder.build(datasets, DataReport())
        used[rank] = datasets[0].rows.tolist()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [family.num_images for family in families] == [6, 5]
    assert used[0] == used[1] == [row for row in range(12) if row != 5]
    again = FakeFamily()
    pipeline(settings, root=tmp_path, family=again)[0].prepare()
    assert not again.batches
