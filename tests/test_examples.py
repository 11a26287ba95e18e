"""The two packages of `examples/`, installed by pip: what they add, and one run that uses all of it.

That nothing of them is in the wheel is held by `test_house_rules.py`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.forks import forked
from support.pages import ROOT

PACKAGES = ("distill-research", "distill-studio")
EDGE = 32
CONFIG = {
    "model_family": "ovis-image",
    "distillation_method": "leap",
    "distillation_config": {"leap": {"num_inference_steps": 2, "teacher_steps": 2}},
    "family_config": {"ovis-image": {"max_sequence_length": 192}},
    "pretrained_model_name_or_path": "model",
    "report_to": "csv,tensorboard",
    "tracker_config": {"csv": {"file": "table.csv"}},
    "resolution": EDGE,
    "resolution_type": "pixel",
    "aspect_bucket_alignment": 16,
    "train_batch_size": 2,
    "max_train_steps": 3,
    "log_step_interval": 1,
    "learning_rate": 1e-3,
    "lora_rank": 4,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "validation_step_interval": 0,
    "validation_prompt": "a noise",
    "evaluation_num_samples": 2,
    "evaluation_teacher_steps": [4],
    "output_dir": "output",
}


@dataclass(frozen=True)
class Place:
    """Where the packages are installed, and a folder to work in."""

    packages: Path
    work: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own, which sees the installed packages and this checkout."""
        path = os.pathsep.join([str(self.packages), *filter(None, [os.environ.get("PYTHONPATH"), *sys.path])])
        return forked(*arguments, processes=1, cwd=self.work, environment={"PYTHONPATH": path})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("examples")
    copies = [shutil.copytree(ROOT / "examples" / name, root / "source" / name) for name in PACKAGES]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", root / "installed", *copies], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (root / "work").mkdir()
    return Place(root / "installed", root / "work")


def write_database(file: Path) -> None:
    rng = np.random.default_rng(0)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE photos (name TEXT PRIMARY KEY, image BLOB, caption TEXT)")
        for number in range(6):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (EDGE, EDGE, 3), dtype=np.uint8)).save(image, "PNG")
            row = (f"{number}.png", image.getvalue(), f"a noise number {number}")
            connection.execute("INSERT INTO photos VALUES (?, ?, ?)", row)
        connection.execute("INSERT INTO photos VALUES ('empty.png', NULL, 'nothing')")


@pytest.fixture(scope="module")
def output(place) -> Path:
    """Of a run whose method, family, data backend and tracker are all other people's."""
    place.python("-m", "distill_studio.ovis_image", "model")
    write_database(place.work / "images.sqlite")
    entry = {"id": "shop", "type": "sqlite", "database": "images.sqlite", "table": "photos"}
    (place.work / "config.json").write_text(json.dumps(CONFIG))
    (place.work / "data.json").write_text(json.dumps([entry]))
    place.python("-m", "distill", "run", "--config", "config.json", "--data", "data.json")
    return place.work / "output"


def test_pip_installs_both_packages_and_their_names_are_there(place):
    listed = place.python("-m", "distill", "plugins", "list").stdout.splitlines()
    for kind, name, package in [
        ("method", "leap", "distill-research"),
        ("tracker", "csv", "distill-research"),
        ("family", "ovis-image", "distill-studio"),
        ("data-backend", "sqlite", "distill-studio"),
    ]:
        lines = [line for line in listed if line.startswith(kind) and f" {name} " in line]
        assert len(lines) == 1, (kind, name, listed)
        assert package in lines[0]
    shown = place.python("-m", "distill", "plugins", "show", "leap").stdout
    assert "teacher_steps" in shown
    assert "K, the teacher's steps in one of the student's." in " ".join(shown.split())


def test_one_run_uses_all_four(output):
    resolved = json.loads((output / "config.resolved.json").read_text())
    assert (resolved["distillation_method"], resolved["model_family"]) == ("leap", "ovis-image")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    with (output / "table.csv").open(newline="") as file:
        table = {(int(row["step"]), row["name"]): float(row["value"]) for row in csv.DictReader(file)}
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        for name in ("loss", "lr", "grad_norm"):
            assert table[row["step"], name] == pytest.approx(row[name]), "the tracker wrote what the run said"
    assert all(row["loss"] > 0 for row in rows)
    report = (output / "data" / "shop" / "report.md").read_text()
    assert "it has no image" in report, "a row without an image is said, and the six others are used"


def test_the_student_is_the_pipelines_of_diffusers(output):
    """The LoRA loads into the plain pipeline's network and changes the image."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline

    student = output / "student"
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(student, subfolder="scheduler")
    pipe = OvisImagePipeline.from_pretrained(output.parent / "model", scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def image() -> np.ndarray:
        call = {"num_inference_steps": 2, "sigmas": [1.0, 0.634], "guidance_scale": 0.0, "output_type": "np"}
        generator = torch.Generator().manual_seed(0)
        return pipe("a noise", width=EDGE, height=EDGE, generator=generator, **call).images[0]

    before = image()
    pipe.transformer.load_lora_adapter(student, weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(image() - before).max() > 1e-4
    pipe.transformer.disable_lora()
    assert np.array_equal(image(), before), "switched off, it is the teacher"


def test_the_packages_own_tests_pass(place):
    tests = [str(ROOT / "examples" / name / "tests") for name in PACKAGES]
    pytest_alone = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull]
    said = place.python(*pytest_alone, *tests).stdout
    assert " passed" in said or "[100%]" in said
    assert "skipped" not in said
