"""A run that is killed at any moment and resumed gives, bit for bit, the run that was not killed."""

import hashlib
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
from safetensors.torch import load_file
from support.small_run import execute, losses, write_run

DRIVER = Path(__file__).parent / "support" / "kill_driver.py"
VARIANTS = {
    "fp32-lora": {},
    "bf16-optimizer": {"optimizer": "adamw_bf16", "mixed_precision": "bf16"},
    "full-ema": {"model_type": "full", "use_ema": True, "learning_rate": 1e-5},
}
RUN_LOADS = {"distill", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "matplotlib",
             "tensorboard", "jinja2", "pydantic", "PIL", "google", "support"}  # fmt: skip
"""Packages of which the driver of the kills imports, once, what a run has loaded here."""

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


def weights_hash(output: Path) -> str:
    """Of every tensor's name and bytes; the order of metadata in a safetensors header is random."""
    digest = hashlib.sha256()
    for file in sorted((output / "student").rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a run of each variant that nobody kills."""
    root = tmp_path_factory.mktemp("resume")
    for variant, settings in VARIANTS.items():
        started = time.monotonic()
        execute(write_run(root, output=f"whole-{variant}", **settings))
        (root / "seconds.txt").write_text(str(time.monotonic() - started))
    return root


@pytest.fixture(scope="module")
def kills(whole):
    """The same runs, killed again and again: (kills, of which while it saved) of each variant."""
    runs = []
    for variant, settings in VARIANTS.items():
        output = f"killed-{variant}"
        runs += [str(write_run(whole, output=output, **settings)), str(whole / output)]
    loaded = [name for name in sys.modules if name.partition(".")[0] in RUN_LOADS]
    (whole / "imports.txt").write_text("\n".join(loaded))
    latest = str(0.6 * float((whole / "seconds.txt").read_text()))
    done = subprocess.run(
        [sys.executable, str(DRIVER), "1", "4", latest, str(whole / "imports.txt"), *runs],
        capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line.split() for line in done.stdout.splitlines() if line.startswith("killed-"))
    return {output.removeprefix("killed-"): (int(killed), int(saving)) for output, killed, saving in lines}


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_bit_for_bit_the_same(whole, kills, variant):
    left_alone, killed = whole / f"whole-{variant}", whole / f"killed-{variant}"
    if variant in GOLDEN:
        found = [figures for _, *figures in losses(left_alone)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(GOLDEN[variant]), rtol=1e-4, atol=0)
    in_all, while_saving = kills[variant]
    assert in_all >= 2, "the process must really have been killed"
    assert while_saving >= 1, "also while it saved"
    assert losses(killed) == losses(left_alone)
    assert weights_hash(killed) == weights_hash(left_alone)


def test_resume_after_the_end_of_a_shorter_run_continues_it(whole):
    execute(write_run(whole, output="parts", max_train_steps=5))
    result, lines = execute(write_run(whole, output="parts", max_train_steps=10))
    assert result.steps == 10
    assert any("resumed" in line for line in lines)
    assert losses(whole / "parts") == losses(whole / "whole-fp32-lora")


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
