"""Two processes see the same samples and take the same steps as one."""

import os
import subprocess
import sys

import pytest
from support.small_run import execute, losses, write_run


def test_two_processes_train_as_one(tmp_path):
    short = {"max_train_steps": 4, "validation_step_interval": 2, "checkpoint_step_interval": 2}
    execute(write_run(tmp_path, output="one", train_batch_size=2, gradient_accumulation_steps=2, **short))
    config = write_run(tmp_path, output="two", train_batch_size=2, gradient_accumulation_steps=1, device="cpu", **short)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "distill"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "run", "--config", str(config)], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for (_, a, norm_a), (_, b, norm_b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert norm_a == pytest.approx(norm_b, rel=1e-3)
    assert (tmp_path / "two" / "student" / "pytorch_lora_weights.safetensors").exists()
    assert done.stderr.count("student written") == 1, "only the first process speaks"
