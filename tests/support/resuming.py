"""A run that is cut off after some step and resumed, against the same run left alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .small_run import execute, losses, write_run
from .tiny_sdxl import write_tiny_sdxl


def resumed_equals_whole(root: Path, cuts: Sequence[int], **settings: Any) -> Path:
    """Run whole, then resume from the checkpoint of each step of `cuts`: the same losses and student, bit for bit.

    Needs ``checkpoint_step_interval`` 1 and no limit below max_train_steps. Returns the folder of the whole run.
    """
    if "model" not in settings and not (root / "model").exists():
        write_tiny_sdxl(root / "model", layers_per_block=1)
    execute(write_run(root, output="whole", **settings))
    whole = root / "whole"
    for cut in cuts:
        part = root / f"cut-{cut}"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "student")
        for later in range(cut + 1, settings["max_train_steps"] + 1):
            shutil.rmtree(part / f"checkpoint-{later}")
        _, lines = execute(write_run(root, output=f"cut-{cut}", **settings))
        assert any("resumed" in line and f"step {cut}" in line for line in lines)
        assert losses(part) == losses(whole)
        for file in (whole / "student").rglob("*.safetensors"):
            left_alone, resumed = load_file(file), load_file(part / file.relative_to(whole))
            assert all(torch.equal(resumed[name], tensor) for name, tensor in left_alone.items())
    return whole
