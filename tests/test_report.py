"""The page of a run: whole in itself, harmless, bounded, and its figures are those of the run's files."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from distill.core.drawing import curves
from distill.core.drawing.curves import curve, short, smoothed, thinned, ticks
from distill.core.errors import UserError
from distill.core.plugin_api.run_state import RunState
from distill.core.report.page import write_report
from distill.core.report.run_contents import MOST_GRIDS
from distill.core.runs.run_log import ENDS, ENDS_WELL, RunLog, read_log
from distill.plugins import report as plugin
from PIL import Image
from support.quickstart import command
from support.report_pages import EVIL, Page, loads_nothing, write_folder
from support.small_run import write_run


def page_of(folder) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    loads_nothing(html)
    return html, Page(html)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("reports") / "run-1")


def test_it_has_every_part(folder):
    html, page = page_of(folder)
    for part in ("scores", "validation", "curves", "data", "use", "notices", "config"):
        assert any(section["id"] == part for section in page.all("section")), part
    figures = "LoRA of rank 64", "50 of 50", "12.5", "1,200 of 1,300", "438", "3 min"
    texts = "finished at 2026-01-02 03:03 UTC", "import torch", "in two lines", "2026-01-02 03:02:00"
    for said in ("run-1", "lcm", "sdxl", "big", *figures, *texts):
        assert said in page.text, said
    assert len(page.images()) == 5
    assert "s3cr3t" not in html


def test_names_and_prompts_stay_text(folder):
    html, page = page_of(folder)
    assert page.text.count("<script>alert(1)</script>") >= 5, "shown as it is written, in each place"
    assert len(page.all("script")) == 1
    assert not [image for image in page.all("img") if "evil" in image["src"]]
    assert "<script>alert" not in html
    assert "print('</code>')" in page.text


def test_curves_and_scores_are_those_of_the_files(folder):
    _, page = page_of(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "lr", EVIL, "samples_per_second"):
        assert page.points(name) == [[row["step"], row[name]] for row in rows]
    cells = [cell["title"] for cell in page.all("td") if "title" in cell]
    expected = []
    for row in json.loads((folder / "evaluation.json").read_text())["rows"]:
        expected += [str(row["scores"][name]) for name in (EVIL, "distance") if name in row["scores"]]
        expected.append(str(row["seconds_per_image"]))
    assert cells == expected


def test_a_long_run_stays_small_and_keeps_its_spikes(tmp_path):
    folder = write_folder(tmp_path / "long", steps=10_000, validations=40)
    rng = np.random.default_rng(0)
    losses = 0.5 + rng.random(10_000)
    losses[6789] = 50.0
    names = [f"x/{number}" for number in range(20)]
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            file.write(json.dumps({"step": step, "loss": loss, **dict.fromkeys(names, loss * step)}) + "\n")
    hard = Image.fromarray(rng.integers(0, 255, (100, 75, 3), dtype=np.uint8)).resize((1500, 2000))
    hard.save(folder / "hard.png", compress_level=1)
    for grid in folder.glob("validation/*/grid.png"):
        shutil.copyfile(folder / "hard.png", grid)
    html, page = page_of(folder)
    assert len(html) < 10_000_000
    assert len(page.images()) == MOST_GRIDS + 2
    steps = [figure["data-step"] for figure in page.all("figure") if "data-step" in figure]
    assert (steps[0], steps[-1]) == ("10", "400")
    assert "12 of 40 validations" in page.text
    points = page.points("loss")
    assert len(points) <= curves.MOST_POINTS
    assert [6790, 50.0] in points
    assert all(losses[int(step) - 1] == value for step, value in points)
    assert "1 beyond the frame" in page.text


@pytest.mark.parametrize(
    ("lines", "status", "says"),
    [
        ([], "unknown", "there is no log"),
        (["run begins", "data ready"], "open", "running, or killed, at step 50"),
        (["run begins", ENDS_WELL], "finished", "finished at"),
        (["run begins", f"{ENDS}Interrupted: stopped at 50"], "interrupted", "interrupted: stopped at 50"),
        (["run begins", f"{ENDS}DistillError: broke"], "failed", "failed at step 50: DistillError: broke"),
        (["run begins", f"{ENDS}Interrupted: stopped", "run begins"], "open", "running, or killed"),
    ],
)
def test_it_says_how_the_run_ended(tmp_path, lines, status, says):
    folder = write_folder(tmp_path / "run")
    (folder / "run.log").write_text("".join(f"2026-01-02T03:04:05Z {line}\n" for line in lines))
    if not lines:
        (folder / "run.log").unlink()
    _, page = page_of(folder)
    (shown,) = [p["class"] for p in page.all("p") if p.get("class", "").startswith("status ")]
    assert shown == f"status {status}"
    assert says in page.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    folder = write_folder(tmp_path / "run")
    for path in folder.iterdir():
        if path.name != "config.resolved.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, page = page_of(folder)
    assert "The student is not exported yet" in page.text
    assert not page.images()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": "NaN"}\n{"step": 2, "lo')
    _, page = page_of(folder)
    assert "not finite at step 1" in page.text


def test_what_is_no_run_or_damaged_is_refused(tmp_path):
    with pytest.raises(UserError, match="not the output folder of a run"):
        write_report(tmp_path)
    folder = write_folder(tmp_path / "run")
    (folder / "config.resolved.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.resolved\.json is not JSON"):
        write_report(folder)
    said = command("report", str(tmp_path))
    assert said.code == 2
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("file", "content", "missing"),
    [
        ("evaluation.json", b"{", ["scores"]),
        ("evaluation.json", b"[]", ["scores"]),
        ("evaluation.json", b'{"rows": 3}', ["scores"]),
        ("evaluation.json", b"\xff\xfe", ["scores"]),
        ("evaluation.png", b"no image", []),
        ("metrics.jsonl", b"[1]\n", ["curves"]),
        ("data/foxes/report.json", b"{}", ["data"]),
        ("data/foxes/contact-sheet.png", b"", []),
        ("validation/step-000030/grid.png", b"no image", []),
        ("student/README.md", b"\xff\xfe", ["use"]),
    ],
)
def test_a_part_that_cannot_be_read_is_left_out_and_said(tmp_path, file, content, missing):
    folder = write_folder(tmp_path / "run")
    whole = {section["id"] for section in page_of(folder)[1].all("section")}
    assert (folder / file).is_file()
    (folder / file).write_bytes(content)
    _, page = page_of(folder)
    if file != "metrics.jsonl":  # of which lines that are no rows are skipped, as always
        assert f"{file.split('/')[-1]}" in page.text
        assert "left out of this page, since it cannot be read" in page.text
    shown = {section["id"] for section in page.all("section")}
    assert {"curves", "validation", "notices", "config"} - set(missing) <= shown <= whole


def state(folder, **extra) -> RunState:
    return RunState(None, folder, None, None, None, **extra)  # type: ignore[arg-type]


def test_its_failure_ends_nothing(tmp_path, said):
    plugin.on_run_end(state(tmp_path))
    assert len(said) == 1
    assert said[0].startswith("warning: report.html could not be written; later: distill report ")
    plugin.on_exception(state(tmp_path), ValueError("x"))
    assert "report.html could not be written" in said[1]
    plugin.on_run_end(state(folder, main=False))
    assert len(said) == 2, "other processes write nothing"


def test_a_fresh_run_leaves_no_page_of_an_earlier_one(tmp_path):
    page = tmp_path / "report.html"
    page.write_text("old")
    plugin.on_run_start(state(tmp_path, step=3))
    assert page.exists()
    plugin.on_run_start(state(tmp_path))
    assert not page.exists()


# -- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_keeps_lines_sessions_and_how_each_ended(tmp_path):
    log = RunLog()
    log.note("said before the folder was open")
    log.open(tmp_path)
    log.note("two\n\nlines \udcff")
    log.note(f"{ENDS}DistillError: broke\nat this")
    log.close()
    second = RunLog()
    second.open(tmp_path)
    second.note(ENDS_WELL)
    second.close()
    first, last = read_log(tmp_path)
    assert [line for _, line in first.lines] == ["said before the folder was open", "two\n\nlines \\udcff"]
    assert first.outcome == "DistillError: broke\nat this"
    assert (last.lines, last.outcome) == ([], "")
    assert 0 <= first.seconds < 60


# -- curves -----------------------------------------------------------------------------------------------------------


def test_thinning_keeps_ends_and_extremes():
    values = np.sin(np.arange(50_000) / 100)
    values[[123, 40_000]] = 5, -5
    kept = thinned(values)
    assert len(kept) <= curves.MOST_POINTS
    assert {0, 123, 40_000, 49_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


def test_smoothing_is_a_mean_without_lag():
    line = np.linspace(3, 8, 400)
    np.testing.assert_allclose(smoothed(line), line)
    noise = np.random.default_rng(0).normal(size=4000)
    assert smoothed(noise)[100:-100].std() < 0.15


def test_points_of_a_curve_are_inside_its_frame_and_in_order():
    steps, values = np.arange(1.0, 101.0), np.geomspace(1e-5, 10, 100)
    found = curve("loss", steps, values)
    assert found.logarithmic
    positions = [tuple(map(float, point.split(","))) for point in found.path[1:].split("L")]
    assert positions[0] == (curves.LEFT, curves.BOTTOM)
    assert positions[-1] == (curves.RIGHT, curves.TOP)
    heights = [y for _, y in positions]
    assert np.allclose(np.diff(heights), (curves.TOP - curves.BOTTOM) / 99, atol=0.11), "straight on this axis"
    assert [tick.label for tick in found.y_ticks] == ["1e-5", "0.001", "0.1", "10"]


ODD = [1.0], [2.0, 2.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, math.nan], [-1e300, 1e300], [1e20, 1e20 + 1e5]


@pytest.mark.parametrize("values", ODD)
def test_odd_curves_are_drawn(values):
    found = curve("x", np.arange(1.0, len(values) + 1), np.array(values))
    assert "nan" not in found.path
    assert "inf" not in found.path
    assert len(found.points) == sum(map(math.isfinite, values))


def test_axes_have_round_numbers():
    assert ticks(0, 10, count=5) == [0, 2, 4, 6, 8, 10]
    assert ticks(1, 3, count=7, whole=True) == [1, 2, 3]
    assert [short(value) for value in (0, 0.08297123, 1e-6, 123456.0, math.nan)] == [
        "0",
        "0.08297",
        "1e-6",
        "1.235e5",
        "nan",
    ]


# -- a real run -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_page_and_a_killed_one_can_have_it(tmp_path):
    config = write_run(tmp_path, max_train_steps=4, evaluation_num_samples=2, evaluation_steps=[1], report_to="none")
    said = command("run", "--config", str(config), "--data", str(tmp_path / "multidatabackend.json"))
    assert said.code == 0, said.err
    out = tmp_path / "out"
    assert f"report: {out / 'report.html'}" in said.err
    html = (out / "report.html").read_text()
    loads_nothing(html)
    page = Page(html)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert page.points("loss") == [[row["step"], row["loss"]] for row in rows]
    assert "finished at" in page.text
    assert "StableDiffusionXLPipeline" in page.text
    assert [line for _, line in read_log(out)[-1].lines if line.startswith("student written to")]
    (out / "report.html").unlink()
    assert command("report", str(out)).out.strip() == str(out / "report.html")
    assert Page((out / "report.html").read_text()).points("loss") == page.points("loss")


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", *options]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    return subprocess.run([*command, profile, page.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="apt-get install chromium")
def test_a_browser_draws_it_without_a_complaint(tmp_path):
    """The script ran (the slider speaks), nothing was refused by the page's own policy, light and dark are two."""
    page = write_report(write_folder(tmp_path / "run"))
    result = browse(page, "--dump-dom")
    assert "CONSOLE" not in result.stderr, result.stderr
    assert "Step 30</output>" in result.stdout
    assert result.stdout.count('class="dot"') == 4
    assert "alert(1)</script>" not in result.stdout
    corners = []
    for options in ([], ["--force-dark-mode"]):
        file = tmp_path / "shot.png"
        browse(page, f"--screenshot={file}", "--window-size=400,900", *options)
        with Image.open(file) as shot:
            corners.append(shot.convert("L").getpixel((3, 3)))
    assert corners[0] > 200 > 50 > corners[1]
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("img-src data:", "img-src https:"))
    assert "CONSOLE" in browse(broken, "--dump-dom").stderr, "complaints are heard"
