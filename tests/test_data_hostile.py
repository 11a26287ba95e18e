"""A folder full of hostile files: the run goes on, the broken ones are named with reasons, odd ones come out right."""

import codecs
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from distill.core.data.samples import images
from distill.core.data.samples.file_checks import printable
from distill.core.data.samples.images import BrokenImage, decode
from support.data_helpers import entry, fill, pipeline, take
from support.hostile import EDGE, encode, fill_hostile, one_bit_png, quadrants

CPU_SECONDS = 30
EXTRA_BYTES = 1.3e9
"""Room for one image of 128 million pixels, decoded and converted."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder, its cases, a prepared pipeline over it, and the bytes and seconds that this took."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "set").mkdir()
    cases = fill_hostile(root / "set")
    before, start = reset_peak(), time.process_time()
    data, lines = pipeline(entry(root / "set"), root=root, micro=1)
    data.prepare()
    yield root, cases, data, lines, peak() - before, time.process_time() - start
    data.close()


def reset_peak() -> int:
    """Bytes in memory now, from where the highest is watched."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def test_more_than_sixty_are_broken_and_more_than_sixty_are_odd(hostile):
    _, cases, *_ = hostile
    assert sum(bool(case.reason) for case in cases.values()) > 60
    assert sum(not case.reason for case in cases.values()) > 60


def test_every_broken_one_is_named_with_its_reason_and_every_other_is_used(hostile):
    _, cases, data, *_ = hostile
    (dataset,) = data._datasets
    counts, index = dataset.counts, dataset.index
    used = {index.key(row) for row in dataset.rows}
    assert used == {key for key, case in cases.items() if not case.reason}
    left_out = {key: why for key, why in every_reason(dataset).items() if key not in used}
    assert left_out.keys() == {key for key, case in cases.items() if case.reason}
    wrong = {key: why for key, why in left_out.items() if not re.search(cases[key].reason, why)}
    assert not wrong
    assert counts.found == len(cases)
    assert counts.left_out == {"no caption": 4, "too long and narrow for the resolution": 1}


def every_reason(dataset):
    index = dataset.index
    rest = {index.key(row): "no caption" for row in np.flatnonzero(index.having("it has no caption"))}
    return dataset.counts.quarantined | rest | {"line.png": "too long and narrow"}


def test_odd_images_have_the_right_pixels(hostile):
    _, cases, data, *_ = hostile
    (dataset,) = data._datasets
    for row in dataset.rows:
        case = cases[dataset.index.key(row)]
        pixels = dataset.pixels(int(row), flip=False).astype(int)
        difference = np.abs(pixels - np.asarray(case.like).astype(int)).max()
        assert difference <= case.tolerance, f"{case.key!r} differs by {difference}"


def test_the_run_trains_on_the_rest_within_bounded_time_and_memory(hostile):
    root, cases, data, lines, extra_bytes, seconds = hostile
    usable = sum(not case.reason for case in cases.values())
    steps = take(data, usable)
    assert len({key for (batch,) in steps for key in batch.keys}) == usable == data.num_samples
    assert all(batch.latents.isfinite().all() for (batch,) in steps)
    assert seconds < CPU_SECONDS
    assert extra_bytes < EXTRA_BYTES, f"{extra_bytes / 1e9:.2f} GB"


def test_the_quarantine_file_has_a_line_for_each(hostile):
    root, cases, data, lines, *_ = hostile
    written = (root / "cache" / "set" / "set.quarantine.txt").read_text().splitlines()
    quarantined = data._datasets[0].counts.quarantined
    assert len(written) == len(quarantined)
    assert written == sorted(written)
    assert all(line.isprintable() for line in written)
    assert any(f"{len(quarantined)} broken and quarantined" in line for line in lines)


def test_broken_files_whose_names_have_line_breaks_take_one_line(tmp_path):
    folder = fill(tmp_path / "set", [(EDGE, EDGE)])
    (folder / "two\nlines: x.png").write_bytes(b"")
    (folder / "red\x1b[31m.png").write_bytes(b"no image")
    data, lines = pipeline(entry(folder), root=tmp_path)
    data.prepare()
    assert (tmp_path / "cache" / "set" / "set.quarantine.txt").read_text().splitlines() == [
        "red\\x1b[31m.png: it is in no image format that can be read",
        "two\\nlines: x.png: it is empty (0 bytes)",
    ]
    assert not any("\x1b" in line or "\n" in line for line in lines)


def test_names_are_shown_as_they_are_where_they_can_be():
    assert printable("a \U0001f469\u200d\U0001f680 caf\u00e9.png") == "a \U0001f469\u200d\U0001f680 caf\u00e9.png"
    assert printable("a\nb\u202ec") == "a\\nb\\u202ec"


def test_unreadable_files_and_folders_are_named(tmp_path):
    folder = fill(tmp_path / "set", [(EDGE, EDGE)] * 3)
    fill(folder / "locked", [(EDGE, EDGE)])
    for path in (folder / "locked", folder / "001.png"):
        path.chmod(0)
    with as_somebody(tmp_path):
        data, _ = pipeline(entry(folder), root=tmp_path)
        counts = data.prepare().datasets["set"]
    assert counts.quarantined == {
        "001.png": "Permission denied", "locked/": "the folder cannot be listed: Permission denied",
    }  # fmt: skip
    assert counts.used == 2


class as_somebody:
    """Without the rights of root, which reads everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, os.geteuid() == 0

    def __enter__(self) -> None:
        if self.root:
            codecs.lookup("utf-8-sig")  # Python's own files may lie where only root reads
            for path in (self.folder, *self.folder.parents):
                if path.stat().st_uid == 0 and Path(tempfile.gettempdir()) in path.parents:
                    path.chmod(0o755)
            os.chown(self.folder, 65534, -1)
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        if self.root:
            os.seteuid(0)


@pytest.mark.slow
def test_folders_may_lie_deeper_than_calls_may(tmp_path):
    folder = fill(tmp_path / "set", [(EDGE, EDGE)])
    deep = str(folder)
    try:
        for _ in range(1200):
            deep += "/d"
            os.mkdir(deep)
        for name in ("000.png", "000.txt"):
            os.link(folder / name, f"{deep}/{name}")
        data, _ = pipeline(entry(folder), root=tmp_path)
        assert data.num_samples == 2
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)  # deeper than Python's own rmtree goes


def test_large_images_are_decoded_one_after_the_other(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(images, "_budget", images._Budget(2 * EDGE * EDGE))
    data, inside, most = encode(quadrants(), "PNG"), [], []

    def work(_: int) -> None:
        with images.decoded(data) as image:
            inside.append(image.size)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(12)))
    assert max(most) == 2


def test_the_limit_of_pixels_is_checked_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99 * 99)
    with pytest.raises(BrokenImage, match="its header says 100x100"):
        decode(one_bit_png(100))
    assert decode(one_bit_png(99)).size == (99, 99)
