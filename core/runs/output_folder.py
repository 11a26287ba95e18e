"""What may happen to an output folder that is not empty: start, resume, or refuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, Finding, UserError
from ..settings.configuration import Configuration

RESOLVED = "config.resolved.json"
STUDENT_FOLDER = "student"
CACHE_FOLDER = "cache"
REPORTS_FOLDER = "data"
RESULTS = (
    "metrics.jsonl", "tensorboard", "validation", "student", "student-online", "evaluation.json", "evaluation.png",
    "run.log", RESOLVED,
)  # fmt: skip
"""What a run writes beside its checkpoints; caches are not among them."""
FOREIGN = ("model_index.json", "pytorch_lora_weights.safetensors", "student", "metrics.jsonl", "training_state.json")
"""Signs of a run or a model that is not ours to write over."""
MISSING = "<not there>"

MAY_CHANGE = frozenset(
    {
        "max_train_steps",
        "num_train_epochs",
        "learning_rate",
        "output_dir",
        "overwrite",
        "resume_from_checkpoint",
        "data_backend_config",
        "plugins",
        "device",
        "num_workers",
        "dataloader_prefetch",
        "vae_batch_size",
        "gradient_checkpointing",
        "max_grad_norm",
        "max_bad_steps",
        "max_bad_share",
        "num_validation_images",
        "evaluators",
        "report_to",
        "log_step_interval",
        "push_to_hub",
        "hub_model_id",
        "publish_to",
    }
)
"""Keys that a resumed run may change."""
MAY_CHANGE_PREFIXES = (
    "lr_",
    "validation_",
    "evaluation_",
    "evaluator_config",
    "tracker_",
    "publisher_config",
    "checkpoint",
)
DATA_MAY_CHANGE = frozenset(
    {
        "type",
        "cache_dir_vae",
        "cache_dir",
        "vae_batch_size",
        "write_batch_size",
        "instance_data_dir",
        "root",
        "csv_file",
        "jsonl_file",
        "parquet_file",
        "shards",
        "metadata_file",
    }
)
"""Keys of a dataset that a resumed run may change: where things lie, and how caches are written. That the samples are
the same is told by their fingerprint, not by these."""
DATA_MAY_CHANGE_PREFIXES = ("aws_",)


@dataclass(frozen=True)
class OutputState:
    """What a run is to do with its output folder."""

    action: Literal["start", "resume"]
    notices: tuple[str, ...] = ()
    clear: bool = False
    """Whether :func:`clear_output_dir` is to remove an earlier run first."""


def check_output_dir(configuration: Configuration) -> OutputState:
    """Return whether the run starts or resumes in its output folder.

    Raises:
        UserError: The folder holds a finished or foreign run, and neither a resume nor ``overwrite`` was asked for.
        ConfigError: A resume is asked for with keys changed that may not change; all of them are named.
    """
    run = configuration.run
    folder = run.output_dir
    resume = run.resume_from_checkpoint
    elsewhere = any(entry.dataset_type == "checkpoints" for entry in configuration.caches)
    if not folder.is_dir() or not any(folder.iterdir()):
        return OutputState("start", _nothing_to_resume(resume, folder, elsewhere))
    if run.overwrite:
        return OutputState("start", (f"overwrite: the earlier run in {folder} is replaced",), clear=True)
    earlier = folder / RESOLVED
    if not earlier.is_file():
        _refuse_foreign(folder)
        return OutputState("start", _nothing_to_resume(resume, folder, elsewhere))
    checkpoints = sorted(folder.glob("checkpoint-*"))
    if not checkpoints and not (folder / "student").exists():
        notice = f"{folder} holds a run that ended before its first checkpoint: it is started afresh"
        return OutputState("start", (notice,), clear=True)
    if resume is None:
        finished = (folder / "student").exists()
        raise UserError(
            f"output_dir = {folder} holds {'a finished' if finished else 'an unfinished'} run.",
            "continue it: --set resume_from_checkpoint=latest; replace it: --overwrite; "
            "or choose another folder: --output-dir DIR.",
        )
    compare_with_earlier(configuration, earlier)
    return OutputState(
        "resume" if checkpoints else "start", () if checkpoints else _nothing_to_resume(resume, folder, elsewhere)
    )


def named_step(resume: str | None) -> int | None:
    """The step of a checkpoint that is named as ``checkpoint-N``, not by a path."""
    match = re.fullmatch(r"checkpoint-(\d+)", resume or "")
    return int(match[1]) if match else None


def _nothing_to_resume(resume: str | None, folder: Path, elsewhere: bool) -> tuple[str, ...]:
    if resume is None:
        return ()
    if resume != "latest" and not (elsewhere and named_step(resume) is not None):
        path = Path(resume) if Path(resume).is_absolute() else folder / resume
        if not path.is_dir():
            raise UserError(
                f"resume_from_checkpoint = {resume!r}: there is no checkpoint {path}.",
                "name a checkpoint-N folder of output_dir, or `latest`.",
            )
    if elsewhere:
        return ()  # whether there is one is known when that place was asked
    return (f"resume_from_checkpoint = {resume}: no checkpoint in {folder}, so the run starts afresh",)


def _refuse_foreign(folder: Path) -> None:
    signs = [name for name in FOREIGN if (folder / name).exists()]
    signs += [path.name for path in sorted(folder.glob("checkpoint-*"))[:1]]
    if signs:
        raise UserError(
            f"output_dir = {folder} holds {', '.join(signs)}, which is not a run of this tool.",
            "choose another folder: --output-dir DIR; or replace it: --overwrite.",
        )


def clear_output_dir(folder: Path) -> None:
    """Remove an earlier run's results and checkpoints from `folder`; caches and anything else stay."""
    for path in [*(folder / name for name in RESULTS), *folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def compare_with_earlier(configuration: Configuration, earlier_file: Path) -> None:
    """Raise ConfigError naming every key that a resume changes and may not."""
    try:
        earlier = json.loads(earlier_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{earlier_file} is not JSON: {error}.", "start over: --overwrite.") from error
    findings = [
        Finding(
            str(earlier_file),
            key,
            now,
            f"cannot change when a run is resumed: it was {before!r}",
            f"set {key} back, or start another run: --output-dir DIR",
        )
        for key, before, now in changes(earlier, configuration.resolved())
    ]
    if findings:
        raise ConfigError(findings)


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, earlier and new value of everything that differs and may not."""
    flat_earlier, flat_now = dict(_flatten(earlier)), dict(_flatten(now))
    for key in dict.fromkeys([*flat_earlier, *flat_now]):
        before, after = flat_earlier.get(key, MISSING), flat_now.get(key, MISSING)
        if before != after and not _may_change(key):
            yield key, before, after


def _may_change(key: str) -> bool:
    top, _, rest = key.partition(".")
    if top == "data":
        name = rest.rsplit(".", 1)[-1]
        return name in DATA_MAY_CHANGE or name.startswith(DATA_MAY_CHANGE_PREFIXES)
    return top in MAY_CHANGE or top.startswith(MAY_CHANGE_PREFIXES)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key == "data" and not prefix and isinstance(value, list):
            yield from _flatten({entry["id"]: entry for entry in value}, "data.")
        elif isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
