"""The report on a dataset: right figures, readable files, cheap on large sets; and the share of waiting for data."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from distill.core.cli import app
from distill.core.data.dataset import Dataset
from distill.core.data.index.index import SCHEMA, Index, write_index
from distill.core.data.report.statistics import statistics_of
from distill.core.data.samples.geometry import Geometry
from distill.core.drawing.charts import Panel, bars, draw, short_number
from distill.core.engine.metrics import Throughput
from matplotlib.figure import Figure
from PIL import Image
from support.data_helpers import entry, fill, pipeline, prompts, take
from support.small_run import execute, write_run
from test_data_pipeline import MIXED
from typer.testing import CliRunner


def report_of(data, folder, name="set"):
    data.write_reports(folder)
    return json.loads((folder / name / "report.json").read_text())


def test_figures_are_those_of_the_files(tmp_path):
    folder = fill(tmp_path / "set", [*MIXED, (640, 480), (32, 8)])
    (folder / "000.txt").write_text("one\ntwo words\nthree long words")
    (folder / "001.txt").write_text("")
    (folder / "002.png").write_bytes(b"no image")
    (folder / "two\nlines.png").write_bytes(b"")
    data, _ = pipeline(entry(folder, repeats=1, maximum_aspect_ratio=3), root=tmp_path, micro=4)
    figures = report_of(data, tmp_path / "out")
    assert (figures["found"], figures["used"], figures["noun"]) == (13, 9, "image")
    assert figures["left_out"] == {"no caption": 1, "wider than maximum_aspect_ratio": 1}
    assert figures["without_caption"] == ["001.png"]
    assert figures["broken"] == {
        "002.png": "it is in no image format that can be read", "two\nlines.png": "it is empty (0 bytes)",
    }  # fmt: skip
    assert figures["width"] == {"lowest": 32, "median": 32, "highest": 640}
    assert figures["height"] == {"lowest": 32, "median": 32, "highest": 480}
    assert figures["aspects"] == {
        "labels": ["1:2", "9:16", "2:3", "3:4", "4:5", "1:1", "5:4", "4:3", "3:2", "16:9", "2:1"],
        "counts": [2, 0, 0, 0, 0, 3, 0, 1, 0, 0, 3],
    }  # fmt: skip
    assert sum(figures["sizes"]["counts"]) == 9
    assert figures["sizes"]["labels"][-1] == "from 1/4"
    assert (figures["captions"], figures["captions_each"]["highest"]) == (11, 3)
    assert figures["words"] == {"lowest": 1, "median": 3, "highest": 3}
    assert figures["word_counts"] == {"labels": ["1", "2", "3-4"], "counts": [1, 1, 9]}


def test_bucket_fill_equals_that_of_the_sample_order(tmp_path):
    data, _ = pipeline(entry(fill(tmp_path / "set", MIXED), repeats=1), root=tmp_path, micro=4)
    data.prepare()
    buckets = {(each["width"], each["height"]): each for each in report_of(data, tmp_path / "out")["buckets"]}
    full = sum(each["full_batches"] for each in buckets.values())
    seen = [tuple(batch.cond["time_ids"][0, 4:6].int().tolist()) for (batch,) in take(data, full)]
    assert {shape: seen.count(shape[::-1]) for shape in buckets} == {
        shape: each["full_batches"] for shape, each in buckets.items()
    }
    assert buckets[32, 32]["per_epoch"] == 10
    assert (buckets[32, 32]["full_batches"], buckets[32, 32]["carried_over"]) == (2, 2)


def test_the_report_has_a_page_charts_and_a_contact_sheet(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    (folder / "000.txt").write_text("a | b <b>bold</b> `code`")
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:1000])
    data, _ = pipeline(entry(folder), root=tmp_path, micro=2)
    (report,) = data.write_reports(tmp_path / "out")
    assert sorted(path.name for path in report.folder.iterdir()) == [
        "contact-sheet.png", "report.json", "report.md", "report.png",
    ]  # fmt: skip
    assert "| images used | 10 |" in report.text
    assert "a \\| b \\<b>bold\\</b> \\`code\\`" in report.text
    sheet = Image.open(report.folder / "contact-sheet.png")
    colours = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1000  # images of noise
    assert report.images.keys() == {"charts", "contact sheet"}
    data.prepare()  # decodes, and finds what the headers do not tell
    (after,) = data.write_reports(tmp_path / "out")
    assert "003.png: image file is truncated" in after.text
    assert not data.write_reports(tmp_path / "out")  # nothing has changed


def test_prompts_have_a_report_without_images(tmp_path):
    (tmp_path / "p.txt").write_text("a fox\na fox in deep snow\nwords " + "word " * 60)
    data, _ = pipeline(prompts("p", prompts_file=tmp_path / "p.txt"), root=tmp_path, images=False)
    figures = report_of(data, tmp_path / "out", "p")
    assert (figures["noun"], figures["sizes"], figures["width"]) == ("prompt", None, None)
    assert figures["words"] == {"lowest": 2, "median": 5, "highest": 61}
    assert sorted(path.name for path in (tmp_path / "out" / "p").iterdir()) == [
        "report.json",
        "report.md",
        "report.png",
    ]
    assert "- a fox in deep snow" in (tmp_path / "out" / "p" / "report.md").read_text()


def test_only_the_first_process_writes(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    pipeline(entry(folder), root=tmp_path)[0].prepare()
    data, _ = pipeline(entry(folder), root=tmp_path, rank=1, world=2)
    assert not data.write_reports(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def synthetic(path, count: int) -> Index:
    """An index of `count` images of a thousand sizes, one caption each."""
    rng = np.random.default_rng(0)
    caption = pa.array([" ".join(["word"] * (number % 40 + 1)) for number in range(1000)], pa.large_string())
    numbers = rng.integers(0, 1000, count)
    offsets = pa.array(np.arange(count + 1), pa.int64())
    digests = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), count, [None, pa.py_buffer(rng.bytes(16 * count))])
    empty = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array([""], pa.large_string()))
    columns = {
        **{name: empty.cast(pa.large_string()) for name in ("version", "caption_version", "position", "problem")},
        "key": pa.array(np.char.mod("%09d.jpg", np.arange(count)), pa.large_string()),
        "size": pa.array(rng.integers(1e5, 1e6, count), pa.int64()),
        "width": pa.array(rng.integers(500, 1500, count), pa.int32()),
        "height": pa.array(rng.integers(500, 1500, count), pa.int32()),
        "draw": pa.array(rng.integers(0, 2**63, count), pa.uint64()), "identity": digests,
        "captions": pa.LargeListArray.from_arrays(offsets, caption.take(pa.array(numbers))),
        "digests": pa.LargeListArray.from_arrays(offsets, digests),
    }  # fmt: skip
    table = pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)
    return write_index(table.to_batches(), path, "rules", folder=path.parent)


@pytest.mark.parametrize("count", [100_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_a_report_of_a_large_dataset_takes_seconds(tmp_path, count):
    settings = entry(tmp_path / "set", resolution=1024, aspect_bucket_alignment=64)
    index = synthetic(tmp_path / "index.arrow", count)
    backend = SimpleNamespace(location="nowhere")
    dataset = Dataset(settings, backend, index, Geometry(settings, multiple=8))
    start = time.process_time()
    figures = statistics_of(dataset, global_batch=64, heaviest=1.0)
    seconds = time.process_time() - start
    print(f"{count:,} rows: {seconds:.2f} s")
    assert figures.used == count
    assert sum(figures.word_counts.counts) == count
    assert sum(bucket.samples for bucket in figures.buckets) == count
    assert seconds < 1 + count / 1e6


def step_to(highest: float) -> float:
    """Return the distance of the lines of an axis up to `highest`."""
    axes = Figure().add_subplot()
    bars(axes, Panel("x", "x", ["a"], [highest], "y"))
    return axes.get_yticks()[1]


def test_axes_have_round_numbers():
    assert [step_to(highest) for highest in (1, 7, 44, 108, 30_000)] == [1, 2, 10, 20, 10_000]
    assert [short_number(value) for value in (0, 7.5, 950, 12_500, 3e6)] == ["0", "7.5", "950", "12.5k", "3M"]
    empty = draw([Panel("nothing", "x", [], [], "y")], title="t", subtitle="s")
    assert empty.width > 600


def test_text_in_charts_stands_as_it_is(recwarn):
    panel = Panel("$x$ 猫", "ελ", ["$\\alpha", "$x^2$"], [1, 0], "हिन्दी", [0.5, 2], ("a", "b"))
    first, again = (draw([panel], title="$a_b$ " * 200, subtitle="猫" * 300) for _ in range(2))
    assert first.tobytes() == again.tobytes()
    edge = np.asarray(first)[:, -8:]
    assert (edge == 255).all(), "long lines are cut"
    assert not recwarn.list


def test_the_command_needs_no_weights(tmp_path):
    config = write_run(tmp_path)
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        whole = weights.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        weights.write_bytes(whole[:header] + bytes(len(whole) - header))  # values that no test of weights would pass
    result = CliRunner().invoke(app, ["data", "report", "--config", str(config)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = tmp_path / "out" / "data" / "noise" / "report.md"
    assert str(page) in result.output
    assert "13 of 13 images" in result.output
    assert "| images used | 13 |" in page.read_text()


def test_a_run_reports_its_data_and_hardly_waits_for_it(tmp_path):
    config = write_run(tmp_path, validation_step_interval=0, report_to="tensorboard", max_train_steps=16)
    _, lines = execute(config)
    assert any("report on dataset 'noise'" in line for line in lines)
    assert (tmp_path / "out" / "data" / "noise" / "contact-sheet.png").is_file()
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line)["wait_for_data_share"] for line in metrics]
    assert len(shares) == 16
    assert np.median(shares[4:]) < 0.01, shares  # the first steps wait for the first batch


def test_waiting_for_data_is_counted():
    def slow():
        while True:
            time.sleep(0.05)
            yield []

    throughput, steps = Throughput(), slow()
    for _ in range(3):
        with throughput.waiting():
            next(steps)
    waited = throughput.read(time.perf_counter())
    assert waited["wait_for_data_share"] > 0.9, "nothing else was done"
    assert throughput.read(time.perf_counter())["wait_for_data_share"] == 0, "each reading begins anew"
