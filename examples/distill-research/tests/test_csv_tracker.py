"""What the table holds when it is read back."""

import csv

from distill.core.plugin_api.tracker import RunInfo
from distill_research.csv_tracker import CSV


def session(folder, *, steps, resumed_step=0):
    tracker = CSV(CSV.Config())
    tracker.start(RunInfo(folder, "project", "run", {}, resumed_step=resumed_step))
    for step in steps:
        tracker.log({"loss": step / 10}, step)
    return tracker


def table(folder):
    with (folder / "figures.csv").open(newline="") as file:
        return [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


def test_figures_and_scores_are_lines(tmp_path):
    session(tmp_path, steps=[1, 2]).finish({"score": 0.5})
    assert table(tmp_path) == [(1, "loss", 0.1), (2, "loss", 0.2), (2, "score", 0.5)]


def test_a_run_that_was_killed_and_resumed_leaves_each_step_once(tmp_path):
    session(tmp_path, steps=[1, 2, 3])
    session(tmp_path, steps=[3, 4], resumed_step=2).finish()
    assert [step for step, _, _ in table(tmp_path)] == [1, 2, 3, 4]
