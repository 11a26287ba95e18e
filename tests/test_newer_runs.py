"""`distill run` and `distill generate` on the families that came last: from a config file to an image."""

from __future__ import annotations

import pytest
from PIL import Image
from support.config_files import distill
from support.small_run import write_run
from support.tiny_families import EDGE, NEWER

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NEWER)
def test_a_run_and_its_students_image(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = NEWER[name]
    config = write_run(
        tmp_path, model=tiny.write(tmp_path / "model"), model_family=tiny.family, resolution=EDGE, max_train_steps=2,
        family_config={tiny.family: tiny.settings}, validation_step_interval=2, gradient_accumulation_steps=1,
        aspect_bucket_alignment=EDGE, validation_resolution=f"{EDGE}x{EDGE}",
    )  # fmt: skip
    done = distill("run", "--config", config)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "student" / "README.md").is_file()
    assert (tmp_path / "out" / "report.html").is_file()
    made = distill("generate", tmp_path / "out", "--prompt", "a fox", "--steps", 2, "--out", tmp_path / "a.png")
    assert made.exit_code == 0, made.output
    assert Image.open(tmp_path / "a.png").size == (EDGE, EDGE)
