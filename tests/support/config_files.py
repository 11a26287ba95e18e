"""Pairs of configuration files for tests, and the real command line in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

PLUGIN = Path(__file__).with_name("fake_plugin.py")


def link_model(folder: Path) -> None:
    """Make `folder` an SDXL whose files are whole: the miniature's parts, without its recipe."""
    from distill.model_families.sdxl import SDXL

    folder.mkdir(exist_ok=True)
    for part in SDXL.miniature.iterdir():
        if part.name != "recipe.json" and not (folder / part.name).exists():
            (folder / part.name).symlink_to(part)


@dataclass
class Pair:
    """A usable pair of files that a test spoils."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    data: Any = None
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        link_model(self.folder / "model")
        (self.folder / "images").mkdir(exist_ok=True)
        self.config = {
            "model_type": "lora",
            "model_family": "sdxl",
            "pretrained_model_name_or_path": "./model",
            "output_dir": "out",
            "distillation_method": "lcm",
            "distillation_config": {"lcm": {"num_ddim_timesteps": 50, "loss_type": "huber"}},
            "adam_weight_decay": 0.0,
            "max_train_steps": 10,
            "report_to": "none",
            **self.config,
        }
        if self.data is None:
            self.data = [{"id": "pets", "type": "local", "instance_data_dir": "images"}]

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

    @property
    def data_file(self) -> Path:
        return self.folder / "multidatabackend.json"

    def write(self) -> None:
        self.config_file.write_text(json.dumps(self.config))
        self.data_file.write_text(json.dumps(self.data))

    def options(self) -> list[str]:
        files = ["--config", str(self.config_file), "--data", str(self.data_file)]
        return [*files, "--plugin", str(PLUGIN), *self.arguments]


def distill(*arguments: str):
    """`distill ARGUMENTS` in this process: exit_code, stdout, stderr, exception."""
    from distill.core.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(text: str) -> str:
    """A message with its line breaks and their indentation undone."""
    return " ".join(text.split())
