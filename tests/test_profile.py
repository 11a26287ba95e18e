"""`distill run --profile`: the table's arithmetic, the trace's names, resumed and short runs, several processes."""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext

import pytest
from distill.core.cli.options import PROFILE_STEPS, Given
from distill.core.engine import profile
from distill.core.engine.profile import Part, StepProfile, parts_of, planned_steps, table
from distill.core.utils.spans import measured_by, span
from support.small_run import execute, write_run
from support.torchrun import launched

LCM_PARTS = [
    "data", "forward student", "forward teacher", "backward student", "reduction", "optimizer student", "averages",
    "metrics", "other",
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [
        (0, 100, range(3, 13)),
        (50, 100, range(53, 63)),  # resumed
        (0, 11, range(1, 11)),  # the warm-up is shorter, so that there are ten
        (0, 4, range(1, 4)),
        (0, 1, range(0, 1)),
        (7, 7, range(0)),
    ],
)
def test_steps_are_profiled_after_a_warm_up_and_as_many_as_there_are(first, last, steps):
    assert planned_steps(10, first=first, last=last) == steps


def test_nothing_is_made_while_nobody_measures():
    assert span("forward", "teacher") is span("data")
    opened = []
    with measured_by(lambda name: nullcontext(opened.append(name))), span("forward", "teacher"), span("data"):
        pass
    assert opened == ["forward teacher", "data"]
    assert span("data") is span("metrics")


def test_each_moment_counts_for_the_innermost_span(monkeypatch):
    """Of a step of 100 ms: 10 data, 20 + 20 teacher, 5 heads inside a forward pass of 25, and 25 in none of them."""
    now = iter(moment / 1e3 for moment in (0, 5, 15, 20, 40, 45, 50, 55, 70, 75, 95, 100))
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(now))
    found = StepProfile()
    spans = found._span
    with spans("step"):
        with spans("data"):
            pass
        with spans("forward teacher"):
            pass
        with spans("forward student"), spans("forward heads"):
            pass
        with spans("forward teacher"):
            pass
    parts = parts_of(found._spans, 1)
    assert [(part.name, part.calls, round(part.cpu_ms), round(part.share, 2)) for part in parts] == [
        ("data", 1, 10, 0.10), ("forward heads", 1, 5, 0.05), ("forward student", 1, 20, 0.20),
        ("forward teacher", 2, 40, 0.40), ("other", 1, 25, 0.25),
    ]  # fmt: skip
    assert "| step            | 1            | 100.00 | 100.0% |" in table(parts)


def test_the_table_has_the_time_of_the_gpu_where_there_is_one():
    lines = table([Part("data", 1, 2.0, 3.0, 0.25), Part("other", 1, 8.0, 9.0, 0.75)]).splitlines()
    assert " ".join(lines[0].split()) == "| part | calls a step | CPU ms | GPU ms | share |"
    assert " ".join(lines[-1].split()) == "| step | 1 | 10.00 | 12.00 | 100.0% |"


def read(folder, name):
    found = json.loads((folder / f"{name}.json").read_text())
    with gzip.open(folder / f"{name}.pt.trace.json.gz") as file:
        return found, json.load(file)["traceEvents"]


def test_a_run_writes_trace_and_table_also_when_it_is_short_or_resumed(tmp_path):
    settings = {
        "profile_steps": 4, "validation_step_interval": 0, "gradient_accumulation_steps": 1, "train_batch_size": 1,
        "report_to": "none",
    }  # fmt: skip
    result, lines = execute(write_run(tmp_path, max_train_steps=3, **settings))
    said = next(line for line in lines if "profile of" in line)
    assert "profile of 2 steps from step 2 (4 were asked for):" in said
    assert "| forward teacher   | 1 " in said
    folder = result.output_dir / "profile"
    found, events = read(folder, "rank0-from-step-2")
    assert (found["first_step"], found["num_steps"]) == (2, 2)
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == LCM_PARTS
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert all(part["cpu_ms"] >= 0 for part in parts.values())
    assert {name: part["calls"] for name, part in parts.items() if "ward" in name} == {
        "forward student": 2, "forward teacher": 1, "backward student": 1,
    }  # fmt: skip
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name: named.count(name) for name in LCM_PARTS[:-1]} == {
        name: round(2 * part["calls"]) for name, part in parts.items() if name != "other"
    }
    assert named.count("step") == 2

    result, _ = execute(write_run(tmp_path, max_train_steps=5, **settings))
    found, _ = read(folder, "rank0-from-step-5")
    assert (found["first_step"], found["num_steps"]) == (5, 1)
    files = (folder / "rank0-from-step-2.json", folder / "rank0-from-step-5.json")
    assert all(file.is_file() for file in files)
    execute(write_run(tmp_path, max_train_steps=1, **settings | {"profile_steps": 0}, overwrite=True))
    assert not folder.exists()  # what the earlier run wrote is its own, and replaced


def test_the_flag_asks_for_ten_steps_unless_the_configuration_names_a_number(tmp_path):
    file = write_run(tmp_path, model=tmp_path)
    assert Given(config=file).load()[0].run.profile_steps == 0
    assert Given(config=file).load(profile=True)[0].run.profile_steps == PROFILE_STEPS == 10
    assert Given(config=file, set_=["profile_steps=25"]).load(profile=True)[0].run.profile_steps == 25


@pytest.mark.slow
def test_each_process_writes_a_trace_of_its_own(tmp_path):
    file = write_run(
        tmp_path, max_train_steps=3, profile_steps=2, validation_step_interval=0, report_to="none", train_batch_size=1
    )
    launched("-m", "distill", "run", "--config", file, cwd=tmp_path)
    for rank in (0, 1):
        found, events = read(tmp_path / "out" / "profile", f"rank{rank}-from-step-2")
        assert [part["name"] for part in found["parts"]] == LCM_PARTS
        assert sum(event["name"] == "forward teacher" for event in events if event.get("cat") == "user_annotation") == 4
