"""Two commented files to start from: a configuration and a data file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..settings.dataset_settings import DatasetSettings
from ..settings.run_settings import FULL_RATE, LORA_RATE, RunSettings
from .published import fitting, usable_here

if TYPE_CHECKING:
    from ..registry.registry import Registry

RUN_VALUES: dict[str, Any] = {
    "pretrained_model_name_or_path": "name/model",
    "output_dir": "../output/my-run",
    "resolution": 1024,
    "resolution_type": "pixel_area",
    "validation_resolution": "1024x1024",
    "learning_rate": None,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 500,
    "max_train_steps": 5000,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "mixed_precision": "bf16",
    "lora_rank": 64,
    "optimizer": "adamw",
    "max_grad_norm": 1.0,
    "validation_step_interval": 250,
    "validation_prompt": "a photo of a harbour at sunrise",
    "checkpoint_step_interval": 500,
    "checkpoints_total_limit": 5,
    "resume_from_checkpoint": "latest",
    "report_to": "tensorboard",
    "seed": 42,
}
DATA_VALUES: dict[str, Any] = {
    "id": "my-images",
    "type": "local",
    "instance_data_dir": "../images",
    "caption_strategy": "textfile",
    "crop": False,
    "resolution": 1.0,
    "resolution_type": "area",
}


def _comment(model: type[BaseModel], key: str) -> str:
    return f"# {' '.join((model.model_fields[key].description or '').split())}"


def starting_config(registry: Registry, *, method: str, family: str, model_type: str) -> str:
    """Return a YAML configuration with the keys that are changed most, each with its meaning.

    Raises:
        UserError: Method or family are not registered.
    """
    chosen, architecture = registry.get("method", method), registry.get("family", family)
    published = fitting(chosen, model_type=model_type, family=architecture.name)
    values = {
        "model_type": model_type,
        "model_family": architecture.name,
        **RUN_VALUES,
        "learning_rate": LORA_RATE if model_type == "lora" else FULL_RATE,
        **usable_here({key: value for each in published for key, value in each.run.items()}),
        "distillation_method": chosen.name,
    }
    if model_type != "lora":
        values.pop("lora_rank")
    lines = ["# What is distilled, and how. All keys: `distill config schema`; check: `distill config check`."]
    for key, value in values.items():
        lines += [_comment(RunSettings, key), f"{key}: {json.dumps(value)}"]
    lines += ["# Settings of the method.", "distillation_config:", f"  {chosen.name}:"]
    own = chosen.Config.model_construct().model_dump(mode="json")
    recommended = {key: value for each in published for key, value in each.method.items()}
    for key, value in {**own, **recommended}.items():
        # a scale that is not written follows the teacher: left as a comment
        start = "    # " if key in chosen.guidance_keys and key not in recommended else "    "
        lines += [f"    {_comment(chosen.Config, key)}", f"{start}{key}: {json.dumps(value)}"]
    if not own:
        lines[-1] += " {}"
    return "\n".join(lines) + "\n"


def starting_data() -> str:
    """Return a YAML list of datasets: one folder of images with captions beside them, and a text cache."""
    lines = ["# Where the images are. Relative paths are relative to this file."]
    for index, (key, value) in enumerate(DATA_VALUES.items()):
        start = "- " if index == 0 else "  "
        lines += [f"  {_comment(DatasetSettings, key)}", f"{start}{key}: {json.dumps(value)}"]
    return "\n".join(lines) + "\n"
