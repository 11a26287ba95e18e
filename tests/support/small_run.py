"""A whole run that takes seconds: a random tiny SDXL, a few noise images, a handful of steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .listening import listening
from .tiny_sdxl import write_tiny_sdxl


def write_images(folder: Path, count: int = 13, *, size: int = 32) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a noise number {i}\n")
    return folder


def write_run(
    root: Path, *, output: str = "out", model: Path | None = None, more_data: Sequence[dict] = (), **settings
) -> Path:
    """Model, images, data file (with `more_data`) and config under `root`; returns the config file."""
    if model is None and not (root / "model").exists():
        write_tiny_sdxl(root / "model")
    if not (root / "images").exists():
        write_images(root / "images")
    images = {"id": "noise", "type": "local", "instance_data_dir": "images", "cache_dir_vae": "cache/vae"}
    data = [images, *more_data]
    (root / "multidatabackend.json").write_text(json.dumps(data))
    config = {
        "model_family": "sdxl",
        "distillation_method": "lcm",
        "distillation_config": {"lcm": {"w_min": 2.0, "w_max": 4.0, "loss_type": "l2"}},
        "pretrained_model_name_or_path": str(model or "model"),
        "output_dir": output,
        "resolution": 32,
        "resolution_type": "pixel",
        "aspect_bucket_alignment": 8,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 10,
        "lora_rank": 4,
        "lora_alpha": 4,
        "adam_weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "validation_prompt": "a noise",
        "validation_step_interval": 4,
        "validation_num_inference_steps": 1,
        "evaluation_teacher_steps": [2],
        "evaluation_num_samples": 0,
        "checkpoint_step_interval": 3,
        "log_step_interval": 2,
        "resume_from_checkpoint": "latest",
        **settings,
    }
    file = root / f"{output}.json"
    file.write_text(json.dumps(config))
    return file


def execute(config_file: Path, **flags):
    """Run it in this process; returns (RunResult, lines said)."""
    from distill.core.config.load import load_configuration
    from distill.core.registry.registry import Registry
    from distill.core.runs.run import run

    registry = Registry.load(flags.pop("plugins", ()), installed=False)
    configuration = load_configuration(registry, config_file=config_file, flags=flags)
    with listening() as lines:
        return run(configuration, registry), lines


def losses(output: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line of metrics.jsonl."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
