"""`distill evaluate` and `distill generate` on a finished run of a random tiny SDXL, LoRAs beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from distill.core.cli.evaluate import evaluate
from distill.core.cli.generate import generate
from distill.core.errors import UserError
from distill.core.runs.finished import open_run
from distill.core.runs.output_folder import RESOLVED
from PIL import Image
from support.finished_run import write_finished_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return write_finished_run(tmp_path_factory.mktemp("finished"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_evaluate_scores_a_finished_run(finished, capsys, said):
    evaluate(finished, steps="1,2", teacher_steps="2,3", num_samples=5)
    assert "student" in capsys.readouterr().out
    assert any(line.startswith("evaluator judge is left out") for line in said)
    found = json.loads((finished / "evaluation.json").read_text())
    assert [(row["name"], row["steps"]) for row in found["rows"]] == [
        ("teacher", 2), ("teacher, DPM++ 2M", 2), ("student", 1), ("student", 2), ("teacher", 3),
    ]  # fmt: skip
    assert found["num_data"] == 13
    for row in found["rows"]:
        assert row["scores"].get("distance_to_teacher_pixels", 1) > 0
        assert np.isfinite(row["scores"]["kernel_distance_to_data_random_convolutions"])
        assert row["seconds_per_image"] > 0
    assert found["prompts"][0].startswith("a noise number"), "captions of the data"
    assert (finished / "evaluation.png").is_file()


def test_a_lora_stands_beside_the_students_and_in_the_teacher(finished):
    style = finished.parent / "style"
    evaluate(finished, steps="2", teacher_steps="2", num_samples=2, lora=[f"{style}:0.5"])
    found = json.loads((finished / "evaluation-with-lora.json").read_text())
    assert found["loras"] == {str(style): 0.5}
    for name, lora in (("plain", []), ("styled", [f"{style}:0.5"]), ("off", [f"{style}:0"])):
        generate(finished, prompt="a noise", seed=3, out=finished / f"{name}.png", lora=lora)
    plain, styled, off = (pixels(finished / f"{name}.png") for name in ("plain", "styled", "off"))
    assert np.abs(plain - styled).max() > 2
    assert np.abs(plain - off).max() <= 1


def test_generate_is_a_function_of_prompt_seed_and_steps(finished, said):
    for name, options in {"a": {}, "b": {}, "seed": {"seed": 4}, "steps": {"steps": 3}}.items():
        generate(finished, prompt="a noise", out=finished / f"{name}.png", **{"seed": 3, **options})
    a, b, seed, steps = (pixels(finished / f"{name}.png") for name in ("a", "b", "seed", "steps"))
    assert np.array_equal(a, b)
    assert np.abs(a - seed).max() > 2
    assert np.abs(a - steps).max() > 2
    assert a.shape == (32, 32, 3)
    generate(finished, prompt="Two Birds!")
    assert (finished / "generated" / "two-birds-1steps-seed0.png").is_file()
    assert "32x32, 1 step, no guidance, seed 0" in said[-1]


def test_a_run_is_found_where_it_was_moved(finished, tmp_path):
    import shutil

    moved = Path(shutil.copytree(finished, tmp_path / "moved"))
    configuration, _ = open_run(moved)
    assert configuration.run.output_dir == moved


@pytest.mark.parametrize(("missing", "problem"), [(RESOLVED, "not the output folder"), ("student", "did not finish")])
def test_a_folder_that_is_no_finished_run_is_refused(finished, tmp_path, missing, problem):
    folder = tmp_path / "out"
    folder.mkdir()
    if missing == "student":
        (folder / RESOLVED).write_text((finished / RESOLVED).read_text())
    for command in (lambda: evaluate(folder), lambda: generate(folder, prompt="a")):
        with pytest.raises(UserError, match=problem) as caught:
            command()
        assert caught.value.remedy


def test_without_its_data_a_run_is_scored_without_distances_to_it(finished, tmp_path, said):
    config = json.loads((finished / RESOLVED).read_text())
    for entry in config["data"]:
        if entry.get("instance_data_dir"):
            entry["instance_data_dir"] = str(tmp_path)
    before = (finished / RESOLVED).read_text()
    (finished / RESOLVED).write_text(json.dumps(config))
    try:
        evaluate(finished, steps="1", teacher_steps="2", num_samples=2)
    finally:
        (finished / RESOLVED).write_text(before)
    assert any(line.startswith("warning: the data cannot be read") for line in said)
    found = json.loads((finished / "evaluation.json").read_text())
    assert found["num_data"] == 0
    assert found["prompts"] == ["a noise", "b"]
