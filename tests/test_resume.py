"""A run that is killed at any moment and resumed gives, byte for byte, the run that was not killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distill.core.errors import Interrupted, UserError
from support.small_run import execute, losses, write_run

CHAOS = Path(__file__).parent / "support" / "chaos.py"
VARIANTS = {
    "fp32-lora": {"evaluation_num_samples": 2, "evaluation_steps": [1]},
    "bf16-optimizer": {"optimizer": "adamw_bf16", "mixed_precision": "bf16"},
    "full-ema": {"model_type": "full", "use_ema": True, "learning_rate": 1e-5},
}

GOLDEN = {
    "fp32-lora": [
        (0.01762586, 0.1239163), (0.0103343, 0.06782857), (0.03349567, 0.1930677), (0.01088046, 0.07345511),
        (0.01222541, 0.07427899), (0.05280875, 0.270585), (0.02429033, 0.1277151), (0.05964391, 0.3198987),
        (0.005397099, 0.02939785), (0.002330788, 0.01106785),
    ],
    "full-ema": [
        (0.01762586, 1.688762), (0.01064493, 0.9854206), (0.03463515, 3.068582), (0.01096048, 1.095576),
        (0.01209868, 1.288384), (0.05036663, 4.662127), (0.02525127, 2.310236), (0.05749093, 4.370102),
        (0.005523358, 0.4853622), (0.002226666, 0.1434704),
    ],
}  # fmt: skip
"""Loss and gradient norm of each step of lcm, written down before core had its wings: a change that changes no numbers
leaves them as they are. Processors round differently in the sixth digit."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_byte_for_byte_the_same(tmp_path, variant):
    """Losses and every file of the student, of runs in two folders, one killed in each of its parts."""
    config = write_run(tmp_path, output="whole", report_to="none", **VARIANTS[variant])
    assert chaos(config, "--kills", "4") == {"caches": 1, "saves": 1, "validations": 1, "export": 1, "rounds": 1}
    if variant in GOLDEN:
        found = [figures for _, *figures in losses(tmp_path / "whole")]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(GOLDEN[variant]), rtol=1e-4, atol=0)


def chaos(config: Path, *options: str, seconds: float = 500) -> dict[str, int]:
    """What tests/support/chaos.py counted; it fails where anything differs from the run that was left alone."""
    done = subprocess.run(
        [sys.executable, str(CHAOS), str(config), *options],
        capture_output=True, text=True, timeout=seconds, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    return {kind: count for kind, count in counts.items() if kind != "seconds"}


STRATEGIES = {"replicate": {}, "fsdp": {"parallel": "fsdp", "model_type": "full", "learning_rate": 1e-5}}
SHORT = {
    "max_train_steps": 6, "checkpoint_step_interval": 2, "validation_step_interval": 3, "report_to": "none",
    "evaluation_num_samples": 2, "evaluation_steps": [1], "use_ema": True, "device": "cpu", "process_timeout": 20,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "options"), [(120, []), (80, ["--bucket", "--seed", "3"])], ids=["folder", "bucket"])
def test_200_kills_with_full_disks_and_outages_change_no_byte(tmp_path, kills, options):
    config = write_run(tmp_path, output="whole", **SHORT)
    counts = chaos(config, "--kills", str(kills), "--full-disks", "0.1", *options, seconds=7200)
    assert sum(counts[kind] for kind in ("caches", "saves", "validations", "export", "anywhere")) == kills


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_30_kills_of_one_of_two_processes_change_no_byte(tmp_path, strategy):
    two = {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    config = write_run(tmp_path, output="whole", **SHORT, **two, **STRATEGIES[strategy])
    counts = chaos(config, "--kills", "30", "--processes", "2", seconds=7200)
    assert sum(counts[kind] for kind in ("caches", "saves", "validations", "export", "anywhere")) == 30


def test_resume_after_the_end_of_a_shorter_run_continues_it(tmp_path):
    execute(write_run(tmp_path, output="whole"))
    execute(write_run(tmp_path, output="parts", max_train_steps=5))
    result, lines = execute(write_run(tmp_path, output="parts", max_train_steps=10))
    assert result.steps == 10
    assert any("resumed" in line for line in lines)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_with_other_images_is_not_resumed(tmp_path):
    config = write_run(tmp_path, max_train_steps=2, validation_step_interval=0)
    execute(config)
    shutil.copy(tmp_path / "images" / "00.png", tmp_path / "images" / "more.png")
    (tmp_path / "images" / "more.txt").write_text("one more")
    with pytest.raises(UserError, match="checkpoint-2 cannot be resumed: its samples are not those"):
        execute(config)


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    short = {"max_train_steps": 3, "validation_step_interval": 0}
    for output, seed in [("a", 1), ("b", 1), ("c", 2)]:
        execute(write_run(tmp_path, output=output, seed=seed, **short))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_accumulating_equals_one_batch_over_a_whole_run(tmp_path):
    short = {"max_train_steps": 4, "validation_step_interval": 0}
    for output, size, parts in [("one", 4, 1), ("four", 1, 4)]:
        execute(write_run(tmp_path, output=output, train_batch_size=size, gradient_accumulation_steps=parts, **short))
    for (_, a, norm_a), (_, b, norm_b) in zip(losses(tmp_path / "one"), losses(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert norm_a == pytest.approx(norm_b, rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_save_and_end_with_130(tmp_path, number):
    config = write_run(tmp_path, max_train_steps=100000, validation_step_interval=0, checkpoint_step_interval=0)
    command = [sys.executable, "-m", "distill", "run", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert json.loads((checkpoint / "manifest.json").read_text())
    assert "resume_from_checkpoint=latest" in err
    assert "Traceback" not in err


def test_resume_refuses_another_model_by_name(tmp_path):
    from support.tiny_sdxl import write_tiny_sdxl

    execute(write_run(tmp_path, max_train_steps=3, validation_step_interval=0))
    other = write_tiny_sdxl(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="model"):
        execute(write_run(tmp_path, model=other, max_train_steps=6, validation_step_interval=0))


def test_interrupted_is_130():
    assert Interrupted.exit_code == 130
