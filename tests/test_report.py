"""The page of a run: whole in itself, harmless, bounded, and its figures are those of the run's files."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from distill.core.drawing import curves
from distill.core.drawing.curves import Curve, Line, Series, curve, short, smoothed, thinned, ticks
from distill.core.errors import UserError
from distill.core.plugin_api.run_state import RunState
from distill.core.report.comparison import differing, labels_of
from distill.core.report.page import write_comparison, write_report
from distill.core.report.run_contents import MOST_GRIDS, evenly
from distill.core.runs.run_log import ENDS, ENDS_WELL, RunLog, read_log
from distill.plugins import report as plugin
from PIL import Image
from support.quickstart import command
from support.report_pages import EVIL, Page, loads_nothing, write_folder, write_scores
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
    steps = [figure["data-label"] for figure in page.all("figure") if "data-label" in figure]
    assert (steps[0], steps[-1]) == ("Step 10", "Step 400")
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
        ("validation/step-000030/scores.json", b'{"step": 30, "scores": 3}', []),
        ("student/README.md", b"\xff\xfe", ["use"]),
    ],
)
def test_a_part_that_cannot_be_read_is_left_out_and_said(tmp_path, file, content, missing):
    folder = write_folder(tmp_path / "run")
    write_scores(folder, {10: 0.5, 20: 0.6, 30: 0.7})
    whole = {section["id"] for section in page_of(folder)[1].all("section")}
    assert (folder / file).is_file()
    (folder / file).write_bytes(content)
    _, page = page_of(folder)
    if file != "metrics.jsonl":  # of which lines that are no rows are skipped, as always
        assert f"{file.split('/')[-1]}" in page.text
        assert "left out of this page, since it cannot be read" in page.text
    shown = {section["id"] for section in page.all("section")}
    assert {"curves", "validation", "notices", "config"} - set(missing) <= shown <= whole


# -- scores of validations ---------------------------------------------------------------------------------------------


def test_the_best_validation_is_marked_and_a_run_that_got_worse_says_so(tmp_path):
    folder = write_folder(tmp_path / "run", steps=400)
    write_scores(folder, {step: 0.9 - abs(step - 110) / 1000 for step in range(10, 410, 10)})
    _, page = page_of(folder)
    assert page.points("a_distance")[0] == [10, 1 - 0.8]
    assert page.text.count("The run got worse after step 110") == 2, "at the top and at the validations"
    assert "The best validation is that of step 110" in page.text
    assert len(page.all("circle")) == 2
    assert "teacher, 50 steps" in page.text
    grids = [figure for figure in page.all("figure") if "data-label" in figure]
    assert len(grids) == MOST_GRIDS
    (best,) = [place for place, grid in enumerate(grids) if grid["data-best"]]
    assert grids[best]["data-label"] == "Step 110"
    (slider,) = page.all("input")
    assert slider["value"] == str(best), "it opens there"
    write_scores(folder, {400: 0.88})
    assert "got worse" not in page_of(folder)[1].text
    assert evenly(40, 4, also=[1, 20]) == [0, 1, 20, 39]


def test_two_runs_stand_side_by_side(tmp_path):
    one, two = (write_folder(tmp_path / name / "run", steps=steps) for name, steps in (("a", 50), ("b", 30)))
    write_scores(one, {10: 0.5, 20: 0.9, 30: 0.2})
    write_scores(two, {10: 0.6, 30: 0.7})
    config = json.loads((two / "config.resolved.json").read_text()) | {"lora_rank": 8, "aws_secret_access_key": "0th3r"}
    (two / "config.resolved.json").write_text(json.dumps(config))
    said = command("report", str(one), str(two))
    assert said.out.strip() == str(one / "report-with-b-run.html"), said.err
    html = (one / "report-with-b-run.html").read_text()
    loads_nothing(html)
    page = Page(html)
    assert {label: len(points) for label, points in page.lines("loss").items()} == {"a/run": 50, "b/run": 30}
    assert page.lines("a_distance") == {
        "a/run": [[10, 0.5], [20, 1 - 0.9], [30, 0.8]],
        "b/run": [[10, 0.4], [30, 1 - 0.7]],
    }
    assert "a/run: The run got worse after step 20" in page.text
    assert "b/run: The best validation is that of step 30" in page.text
    labels = [figure["data-label"] for figure in page.all("figure") if "data-label" in figure]
    assert labels == ["Step 10", "Steps 20 and 10", "Step 30"]
    assert "lora_rank648" in "".join(page.text.split())
    assert "a/runstudent" in "".join(page.text.split())
    assert "s3cr3t" not in html
    assert "0th3r" not in html
    assert "output_dir" not in dict.fromkeys(key for key, _, _ in differing({"output_dir": "a"}, {"output_dir": "b"}))
    assert (labels_of(one, two), labels_of(one, one.parent)) == (("a/run", "b/run"), ("run", "a"))


def test_two_runs_of_other_prompts_and_samples_say_so(tmp_path):
    one, two = (write_folder(tmp_path / name) for name in ("one", "two"))
    write_scores(one, {10: 0.5})
    write_scores(two, {10: 0.6})
    for file in (two / "validation/step-000010").glob("*seed1.png"):
        file.rename(file.with_name(file.name.replace("seed1", "seed2")))
    scores = two / "validation/step-000010/scores.json"
    scores.write_text(scores.read_text().replace('"seed": 1', '"seed": 2'))
    page = Page(write_comparison(one, two).read_text())
    assert "no image has a counterpart" in page.text
    assert "were scored on other samples" in page.text
    scores.unlink()
    assert "Its validations are not scored" in Page(write_comparison(one, two).read_text()).text


def test_what_cannot_be_laid_side_by_side_is_refused(tmp_path):
    one, two = write_folder(tmp_path / "one"), write_folder(tmp_path / "two")
    write_scores(one, {10: 0.5})
    shutil.rmtree(two / "validation")
    for other, says in (
        (one, "are the same run"),
        (tmp_path, "not the output folder of a run"),
        (two, "has no validation"),
    ):
        said = command("report", str(one), str(other))
        assert said.code == 2
        assert says in said.err
        assert "Traceback" not in said.err
    assert command("report", str(tmp_path), str(one)).code == 2
    assert not list(tmp_path.glob("*.*")), "nothing is written into what is no run"


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


def curve_of(steps: np.ndarray, values: np.ndarray) -> tuple[Curve, Line]:
    found = curve("loss", [Series("", steps, values)])
    return found, found.lines[0]


def test_lines_of_one_chart_share_its_frame_and_levels_are_inside_it():
    steps = np.arange(1.0, 5)
    one, two = Series("one", steps, steps), Series("two", 2 * steps, 3 * steps, best=8, number=1)
    found = curve("x", [one, two], [("teacher", 20.0)])
    assert (found.x_range[0], found.x_range[1]) == (1, 8)
    assert found.y_range[1] >= 20
    assert found.lines[1].best == (8, 12.0)
    assert found.lines[1].best_at == (curves.RIGHT, pytest.approx(float(found.lines[1].path.split(",")[-1])))
    heights = [float(line.path.split(",")[-1]) for line in found.lines]
    assert found.levels[0].at < heights[1] < heights[0], "higher values stand higher"


def test_points_of_a_curve_are_inside_its_frame_and_in_order():
    steps, values = np.arange(1.0, 101.0), np.geomspace(1e-5, 10, 100)
    found, line = curve_of(steps, values)
    assert found.logarithmic
    positions = [tuple(map(float, point.split(","))) for point in line.path[1:].split("L")]
    assert positions[0] == (curves.LEFT, curves.BOTTOM)
    assert positions[-1] == (curves.RIGHT, curves.TOP)
    heights = [y for _, y in positions]
    assert np.allclose(np.diff(heights), (curves.TOP - curves.BOTTOM) / 99, atol=0.11), "straight on this axis"
    assert [tick.label for tick in found.y_ticks] == ["1e-5", "0.001", "0.1", "10"]


ODD = [1.0], [2.0, 2.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, math.nan], [-1e300, 1e300], [1e20, 1e20 + 1e5]


@pytest.mark.parametrize("values", ODD)
def test_odd_curves_are_drawn(values):
    _, line = curve_of(np.arange(1.0, len(values) + 1), np.array(values))
    assert "nan" not in line.path
    assert "inf" not in line.path
    assert len(line.points) == sum(map(math.isfinite, values))


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
    config = write_run(
        tmp_path, max_train_steps=4, evaluation_num_samples=3, evaluation_steps=[1], report_to="none",
        validation_step_interval=2, validation_scores=True, validation_scores_num_samples=2,
    )  # fmt: skip
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
    score = "kernel_distance_to_data_random_convolutions"
    written = [json.loads((out / f"validation/step-00000{step}/scores.json").read_text()) for step in (2, 4)]
    assert page.points(score) == [[found["step"], found["scores"][score]] for found in written]
    assert "teacher, 2 steps" in page.text, "of the same samples, which are the first of the evaluation's"
    assert f"scores at step 4: {score.replace('_', ' ')}" in said.err
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
    folder = write_folder(tmp_path / "run")
    write_scores(folder, {10: 0.5, 20: 0.9, 30: 0.2})
    page = write_report(folder)
    result = browse(page, "--dump-dom")
    assert "CONSOLE" not in result.stderr, result.stderr
    assert "Step 20 ★ best: " in result.stdout, "it opens at the best"
    assert result.stdout.count('class="dot run0"') == 6
    assert result.stdout.count(">★</button>") == 1
    shutil.copytree(folder, tmp_path / "other")
    both = write_comparison(folder, tmp_path / "other")
    compared = browse(both, "--dump-dom")
    assert "CONSOLE" not in compared.stderr, compared.stderr
    assert "Step 30</output>" in compared.stdout
    assert compared.stdout.count('class="dot run1"') == 6
    for each in (page, both):  # nothing is wider than a phone: the page says so in its title
        narrow = each.with_name("narrow.html")
        script = "document.title = document.documentElement.scrollWidth > innerWidth ? 'too wide' : 'fits';"
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", each.read_text())
        narrow.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
        assert "<title>fits</title>" in browse(narrow, "--dump-dom", "--window-size=390,900").stdout
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
