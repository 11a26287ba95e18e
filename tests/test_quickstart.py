"""The quickstart's two files, verbatim, through the command line to the end: only paths, model and sizes differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from support.quickstart import (
    FILES,
    NOTICES,
    NUM_IMAGES,
    ONE_BATCH,
    SIZES,
    TINY,
    TINY_DATA,
    Said,
    command,
    no_services,
    sets,
    write_workspace,
)

DATASET = "data.your-dataset-name"
PATHS = ("--config", "config.json", "--data", "multidatabackend.json", "--model", "model")
LENGTH = ("max_train_steps=6", "log_step_interval=1", "validation_step_interval=1", "validation_num_inference_steps=1")
"""Longer than the five steps after which the length is estimated; validation at every step."""


@dataclass(frozen=True)
class Finished:
    """A run of the quickstart's files that has ended."""

    root: Path
    said: Said

    @property
    def output(self) -> Path:
        return self.root / "output"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module")
def finished(workspace) -> Finished:
    with no_services(workspace):
        said = command("run", *PATHS, "--output-dir", "output", *sets((*TINY, *TINY_DATA, *LENGTH)))
    return Finished(workspace, said)


def test_the_files_run_to_the_end_as_they_are(finished):
    """wandb without the package, a placeholder for the hub, adamw_bf16, `latest` with nothing to resume."""
    assert finished.said.code == 0, finished.said.err
    assert "Traceback" not in finished.said.err
    assert "resume_from_checkpoint = latest: no checkpoint" in finished.said.err
    for service in ("tracker wandb is left out", "is a placeholder", "there is no Hugging Face token"):
        assert finished.said.err.count(service) == 1
    student = finished.output / "student"
    assert {path.name for path in student.iterdir()} >= {"pytorch_lora_weights.safetensors", "scheduler", "README.md"}
    rows = [json.loads(line) for line in (finished.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row["lr"] for row in rows[:3]] == pytest.approx([0.0, 1e-7, 2e-7]), "1e-4 after 1000 steps of warm-up"


def test_what_ran_is_what_the_files_say(finished):
    """Everything but paths, model and the overrides above is the file's, defaults included."""
    given = json.loads((FILES / "config.json").read_text())
    resolved = json.loads((finished.output / "config.resolved.json").read_text())
    overridden = {text.partition("=")[0] for text in (*TINY, *LENGTH)}
    paths = {"output_dir", "pretrained_model_name_or_path", "aspect_bucket_rounding"}
    kept = {key: value for key, value in given.items() if key not in overridden | paths}
    read = {key: resolved[key] for key in kept}
    assert read.pop("distillation_config")["lcm"].items() >= kept.pop("distillation_config")["lcm"].items()
    assert (read.pop("report_to"), read.pop("validation_prompt")) == (["wandb"], [kept.pop("validation_prompt")])
    kept.pop("report_to")
    assert read == kept


def test_config_check_prints_the_expected_notices_and_no_others(workspace):
    with no_services(workspace):
        folder = f"{DATASET}.instance_data_dir=images"
        said = command("config", "check", *PATHS, "--output-dir", "other", "--set", folder)
    assert said.code == 0, said.err
    assert said.out.splitlines() == [f"notice: {notice}" for notice in NOTICES]
    assert said.err.splitlines() == ["the configuration is usable"]


def test_the_files_untouched_name_the_folder_that_is_missing(workspace):
    with no_services(workspace):
        said = command("config", "check", *PATHS, "--output-dir", "other")
    assert said.code == 2
    assert "multidatabackend.json: data.your-dataset-name.instance_data_dir = '/path/to/your/dataset'" in said.err
    assert said.err.startswith("error: the configuration has 1 problem:")


def test_the_low_vram_variant_runs_as_it_is(workspace):
    """Merged as its users merge it: the base quantised by quanto, a LoRA on it by Lion, exported."""
    merged = {name: json.loads((FILES / f"{name}.json").read_text()) for name in ("config", "low-vram")}
    (workspace / "merged.json").write_text(json.dumps(merged["config"] | merged["low-vram"]))
    arguments = ("--config", "merged.json", *PATHS[2:], "--output-dir", "low", *sets((*TINY, *TINY_DATA)))
    with no_services(workspace):
        said = command("run", *arguments)
    assert said.code == 0, said.err
    assert "base_model quantised by int8-quanto: " in said.err
    assert "text_encoder" not in said.err, "no_change asks for nothing"
    assert (workspace / "low" / "student" / "pytorch_lora_weights.safetensors").is_file()


def test_the_run_estimates_its_own_length(finished):
    (line,) = [line for line in finished.said.err.splitlines() if "per step the remaining" in line]
    assert "the remaining 1 steps take about" in line
    assert "validation not counted" in line


def test_fewer_than_ten_thousand_images_are_said_before_training(finished):
    lines = finished.said.err.splitlines()
    (warning,) = [number for number, line in enumerate(lines) if "are fewer than the 10,000" in line]
    assert lines[warning].startswith(f"{NUM_IMAGES} images")
    assert "expect" in lines[warning]
    assert warning < next(number for number, line in enumerate(lines) if line.startswith("step 1/6"))


def test_images_of_several_aspect_ratios_land_in_buckets(finished):
    (line,) = [line for line in finished.said.err.splitlines() if line.startswith("dataset 'your-dataset-name'")]
    assert f"{NUM_IMAGES} of {NUM_IMAGES} images in 3 buckets" in line
    for width, height in SIZES:
        assert f"{width}x{height}: {NUM_IMAGES // len(SIZES)}" in line


def test_validation_is_made_at_each_resolution_with_the_teacher_beside_it(finished):
    for step in range(1, 7):
        folder = finished.output / "validation" / f"step-{step:06d}"
        found = {Image.open(path).size for path in folder.glob("*.png") if path.name != "grid.png"}
        assert found == set(SIZES)
        assert (folder / "grid.png").is_file()
    teacher = list((finished.output / "validation" / "teacher").glob("*.png"))
    assert len(teacher) == 2 * len(SIZES), "at the student's steps and in full, once for the whole run"
    assert "1 step, no guidance, beside the teacher at 1 and 2" in finished.said.err


def test_the_exported_scheduler_is_the_one_the_student_was_trained_for(finished):
    from diffusers import LCMScheduler

    config = LCMScheduler.from_pretrained(finished.output / "student", subfolder="scheduler").config
    lcm = json.loads((FILES / "config.json").read_text())["distillation_config"]["lcm"]
    assert config.original_inference_steps == lcm["num_ddim_timesteps"]
    assert config.timestep_scaling == lcm["timestep_scaling_factor"]
    model = json.loads((finished.root / "model" / "scheduler" / "scheduler_config.json").read_text())
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert config[key] == model[key]


def test_a_second_run_calls_no_encoder_for_what_is_cached(finished):
    """Another run on the same data: the caches lie where the data file says, and encoders that fail are never asked."""
    from distill.model_families.sdxl import SDXL

    def refuse(*_, **__):
        raise AssertionError("an encoder was called")

    assert sorted(path.name for path in (finished.root / "cache").iterdir()) == ["text", "vae"]
    with no_services(finished.root) as patch:
        patch.setattr(SDXL, "encode_prompts", refuse)
        patch.setattr(SDXL, "encode_images", refuse)
        said = command("run", *PATHS, "--output-dir", "second", *sets((*TINY, ONE_BATCH, *TINY_DATA)))
    assert said.code == 0, said.err
    assert "everything was cached" in said.err


def test_a_second_stage_starts_from_the_first_student(finished):
    """8 steps, then 4: the second student begins as the first, and is exported for its own number of steps."""
    from safetensors.torch import load_file

    stages = {
        "stage-8": ("validation_num_inference_steps=8", "learning_rate=1e-2", "lr_warmup_steps=0"),
        "stage-4": ("validation_num_inference_steps=4", "learning_rate=1e-9", "init_lora=stage-8/student"),
    }
    with no_services(finished.root):
        for output, overrides in stages.items():
            said = command("run", *PATHS, "--output-dir", output, *sets((*TINY, ONE_BATCH, *TINY_DATA, *overrides)))
            assert said.code == 0, said.err
    first, second = (
        load_file(finished.root / output / "student" / "pytorch_lora_weights.safetensors") for output in stages
    )
    assert first.keys() == second.keys()
    assert any(tensor.abs().max() > 1e-3 for name, tensor in first.items() if "lora_B" in name), (
        "the first stage learned"
    )
    assert all((first[name].float() - second[name].float()).abs().max() < 1e-6 for name in first)
    for output, steps in (("stage-8", 8), ("stage-4", 4)):
        assert f"num_inference_steps={steps}," in (finished.root / output / "student" / "README.md").read_text()
