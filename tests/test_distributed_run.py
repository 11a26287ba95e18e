"""Two processes see the same samples and take the same steps as one."""

import json
import shutil

import pytest
from distill.core.errors import UserError
from support.forks import forked
from support.small_run import execute, losses, write_run
from support.torchrun import launched


def test_two_processes_train_as_one(tmp_path):
    short = {"max_train_steps": 4, "validation_step_interval": 2, "checkpoint_step_interval": 2}
    execute(write_run(tmp_path, output="one", train_batch_size=2, gradient_accumulation_steps=2, **short))
    config = write_run(tmp_path, output="two", train_batch_size=2, gradient_accumulation_steps=1, device="cpu", **short)
    done = launched("-m", "distill", "run", "--config", config, timeout=400)
    for (_, a, norm_a), (_, b, norm_b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert norm_a == pytest.approx(norm_b, rel=1e-3)
    assert (tmp_path / "two" / "student" / "pytorch_lora_weights.safetensors").exists()
    assert done.stderr.count("student written") == 1, "only the first process speaks"
    assert "2 processes over gloo: the base on each, gradients averaged" in done.stderr

    # two processes' checkpoint is continued by one, and the other way round is refused with another batch
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    (tmp_path / "two" / "metrics.jsonl").unlink()
    execute(write_run(tmp_path, output="two", train_batch_size=1, gradient_accumulation_steps=4, **short))
    for (step, a, _), (again, b, _) in zip(losses(tmp_path / "one")[2:], losses(tmp_path / "two"), strict=True):
        assert (step, a) == (again, pytest.approx(b, rel=1e-4))
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    with pytest.raises(UserError, match=r"its steps had \[4\] samples over all processes, and these have \[2\]"):
        execute(write_run(tmp_path, output="two", train_batch_size=1, gradient_accumulation_steps=2, **short))


def test_alternate_updates_shared_lengths_and_running_means_are_those_of_one_process(tmp_path):
    """Each step simulates as many calls of the student on every process, and steps three roles in turn."""
    settings = {
        "fake_updates_per_student_update": 2,
        "gan_weight": 0.1,
        "divergence": "js",
        "guidance_scale": 3.0,
        "r1_weight": 0.1,
    }
    short = {
        "distillation_method": "dmd2",
        "distillation_config": {"dmd2": settings},
        "max_train_steps": 4,
        "validation_step_interval": 0,
        "checkpoint_step_interval": 0,
        "lora_dropout": 0.3,
        "device": "cpu",
    }
    execute(write_run(tmp_path, output="one", train_batch_size=2, gradient_accumulation_steps=2, **short))
    config = write_run(tmp_path, output="two", train_batch_size=2, gradient_accumulation_steps=1, **short)
    forked("-m", "distill", "run", "--config", config, timeout=400)
    one, two = (
        [json.loads(line) for line in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]
        for output in ("one", "two")
    )
    assert [row.keys() for row in one] == [row.keys() for row in two]
    assert [("loss" in row, "fake_score/loss" in row) for row in one] == [(False, True), (True, True)] * 2
    for ours, theirs in zip(one, two, strict=True):
        for key in ours.keys() - {"samples_per_second", "wait_for_data_share"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), (ours["step"], key)
