"""The quickstart's own files in a folder of their own, and the command line in this process, on a random tiny SDXL."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .tiny_sdxl import write_tiny_sdxl

FILES = Path(__file__).parents[2] / "docs" / "quickstart"
SIZES = ((32, 32), (40, 24), (24, 40))
"""(width, height) of the images: three aspect ratios."""
NUM_IMAGES = 12
TINY = (
    "validation_resolution=32x32,40x24,24x40",
    "aspect_bucket_alignment=8",
    "evaluation_teacher_steps=2",
    "evaluation_num_samples=0",
    "max_train_steps=2",
    "validation_step_interval=0",
)
"""Overrides that make any run of the quickstart's config.json one of seconds."""
TINY_DATA = (
    "data.your-dataset-name.instance_data_dir=images",
    "data.your-dataset-name.resolution=0.001024",
    "data.your-dataset-name.minimum_image_size=0",
)
"""The same for its data file: a thousandth of a megapixel."""
ONE_BATCH = "gradient_accumulation_steps=1"
"""A quarter of its passes for a step, where another run makes them all."""


NOTICES = (
    "aspect_bucket_rounding = 64 is above 9 decimals: read as aspect_bucket_alignment = 64 px",
    "validation_negative_prompt has no effect without guidance (validation_guidance is 0 or 1)",
    "minimum_image_size = 0.5, maximum_image_size = 1: below 8 under resolution_type pixel, read as megapixels",
    "tracker wandb is left out, the run goes on: wandb is not installed (pip install 'wandb>=0.19')",
    "hub: hub_model_id = 'your-username/sdxl-lcm-distilled' is a placeholder (set your own name/repository); "
    "the run goes on, and the student stays in the output folder",
    "hub: there is no Hugging Face token (run `hf auth login`, or set HF_TOKEN); "
    "the run goes on, and the student stays in the output folder",
)
"""What the two files say on a machine without wandb and without an account."""


def sets(overrides: Sequence[str]) -> list[str]:
    """As arguments of the command line."""
    return [argument for text in overrides for argument in ("--set", text)]


@dataclass(frozen=True)
class Said:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


def command(*arguments: str) -> Said:
    """`distill ARGUMENTS` in this process."""
    from distill.core.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(arguments)
    code = ended.value.code
    return Said(code if isinstance(code, int) else int(bool(code)), out.getvalue(), err.getvalue())


def write_images(folder: Path, *, count: int = NUM_IMAGES, seed: int = 0) -> Path:
    """Noise of three aspect ratios with captions beside it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a noise number {number}\n")
    return folder


def write_workspace(folder: Path) -> Path:
    """The quickstart's files verbatim, with images and a model beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    write_images(folder / "images")
    write_tiny_sdxl(folder / "model", layers_per_block=1)
    return folder


@contextmanager
def no_services(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Inside: in `folder`, no wandb package, no Hugging Face token."""
    import importlib.util

    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> object:
        return None if name == "wandb" else real(name, package)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(importlib.util, "find_spec", find_spec)
        patch.setattr("huggingface_hub.get_token", lambda: None)
        for name in ("HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        yield patch
