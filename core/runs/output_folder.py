"""What may happen to an output folder that is not empty: start, resume, or refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from ..errors import ConfigError, Finding, UserError
from ..settings.configuration import Configuration
from ..settings.dataset_settings import DatasetSettings
from ..settings.run_settings import RunSettings
from .run_files import FILE, RunFiles

RESOLVED = "config.resolved.json"
STUDENT_FOLDER = "student"
ONLINE_FOLDER = "student-online"
CACHE_FOLDER = "cache"
REPORTS_FOLDER = "data"
PROFILE_FOLDER = "profile"
EVALUATION = ("evaluation.json", "evaluation.png")
NAMES = (
    "metrics.jsonl", "tensorboard", "validation", STUDENT_FOLDER, ONLINE_FOLDER, *EVALUATION, "run.log", RESOLVED,
    "report.html", PROFILE_FOLDER,
)  # fmt: skip
"""Names that every run uses in its folder, beside its checkpoints and its caches."""
SIGNS = ("model_index.json", "pytorch_lora_weights.safetensors", "training_state.json")
"""Further signs of a run or a model that is not ours to write over."""
NAMED_AT_MOST = 10
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MISSING = "<not there>"
ROLES = "role_optimizers"
NOT_SET = (MISSING, None, {})
"""Values of one of its keys that leave it to the method and the run."""

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
        "train_batch_size",  # the samples of a step may not, which the checkpoint tells
        "gradient_accumulation_steps",
        "parallel",
        "parallel_offload",
        "parallel_shard_size",
        "num_workers",
        "dataloader_prefetch",
        "vae_batch_size",
        "gradient_checkpointing",
        "activation_offload",
        "merge_for_inference",
        "compile",
        "activation_memory_budget",
        "tf32",
        "attention_kernels",
        "max_grad_norm",
        "max_bad_steps",
        "max_bad_share",
        "num_validation_images",
        "evaluators",
        "report_to",
        "log_step_interval",
        "profile_steps",
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
        "train_batch_size",
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
    """Whether what an earlier run wrote (:class:`RunFiles`) is to be removed first."""


def check_output_dir(configuration: Configuration) -> OutputState:
    """Return whether the run starts or resumes in its output folder.

    Raises:
        UserError: The folder holds a finished or foreign run, and neither a resume nor ``overwrite`` was asked for.
        ConfigError: A resume is asked for with keys changed that may not change; all of them are named.
    """
    run = configuration.run
    folder, resume, files = run.output_dir, run.resume_from_checkpoint, RunFiles(run.output_dir)
    elsewhere = any(entry.dataset_type == "checkpoints" for entry in configuration.caches)
    if run.overwrite and folder.is_dir():
        _refuse_to_replace(files)
        replaced = (f"overwrite: the earlier run in {folder} is replaced",) if files.claimed else ()
        return OutputState("start", replaced, clear=bool(files.claimed))
    if not (folder / RESOLVED).is_file():
        _refuse_foreign(files)
        return OutputState("start", _nothing_to_resume(resume, folder, elsewhere))
    checkpoints, finished = checkpoint_folders(folder), (folder / STUDENT_FOLDER).exists()
    if not checkpoints and not finished:
        _refuse_to_replace(files)
        notice = f"{folder} holds a run that ended before its first checkpoint: it is started afresh"
        return OutputState("start", (notice,), clear=True)
    if resume is None:
        raise UserError(
            f"output_dir = {folder} holds {'a finished' if finished else 'an unfinished'} run.",
            "continue it: --set resume_from_checkpoint=latest; replace it: --overwrite; "
            "or choose another folder: --output-dir DIR.",
        )
    compare_with_earlier(configuration, folder / RESOLVED)
    if not checkpoints and not elsewhere and named_step(resume) is None and not Path(resume).is_dir():
        raise UserError(
            f"resume_from_checkpoint = {resume}: output_dir = {folder} holds a finished run without its checkpoints.",
            "replace it: --overwrite; or choose another folder: --output-dir DIR.",
        )
    foreign = files.foreign(lambda name: name in (STUDENT_FOLDER, ONLINE_FOLDER))
    if foreign:
        raise UserError(
            f"output_dir = {folder}: the run that is to be resumed did not write {_listed(foreign)}, and would replace "
            "it at its end.",
            "move these away, or choose another folder: --output-dir DIR.",
        )
    return OutputState(
        "resume" if checkpoints else "start", () if checkpoints else _nothing_to_resume(resume, folder, elsewhere)
    )


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders named as checkpoints are, complete or not, oldest first."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))}
    return [path for _, path in sorted(found.items()) if path.is_dir()]


def named_step(resume: str | None) -> int | None:
    """The step of a checkpoint that is named as ``checkpoint-N``, not by a path."""
    match = _CHECKPOINT.fullmatch(resume or "")
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


def _in_the_way(name: str) -> bool:
    return name in NAMES or name.startswith("checkpoint-")


def _refuse_foreign(files: RunFiles) -> None:
    """Raise UserError where the folder holds something of somebody else that a run would write into or over."""
    signs = [name for name in SIGNS if (files.folder / name).exists()]
    found = [*signs, *files.foreign(_in_the_way)]
    if found:
        raise UserError(
            f"output_dir = {files.folder} holds {_listed(found)}, which is not a run of this tool.",
            "choose another folder: --output-dir DIR; or move these away: --overwrite removes only what a run wrote.",
        )


def _refuse_to_replace(files: RunFiles) -> None:
    """Raise UserError where replacing an earlier run would remove or mix with what it did not write."""
    found = files.foreign(_in_the_way)
    if found:
        raise UserError(
            f"output_dir = {files.folder} cannot be replaced: its run did not write {_listed(found)} "
            f"(what it wrote stands in {FILE}), and only what it wrote is ever removed.",
            "move these away, or choose another folder: --output-dir DIR.",
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more


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
        if not (before is MISSING and _is_default(key, now, configuration))  # a key that the earlier version lacked
    ]
    if findings:
        raise ConfigError(findings)


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, earlier and new value of everything that differs and may not."""
    flat_earlier, flat_now = dict(flattened(earlier)), dict(flattened(now))
    for key in dict.fromkeys([*flat_earlier, *flat_now]):
        before, after = flat_earlier.get(key, MISSING), flat_now.get(key, MISSING)
        if key.startswith(ROLES) and before in NOT_SET and after in NOT_SET:
            continue
        if before != after and not _may_change(key):
            yield key, before, after


def _is_default(key: str, value: object, configuration: Configuration) -> bool:
    """Return True if the value of a dotted key is what stands there where nobody sets it."""
    top, _, rest = key.partition(".")
    name = rest.rpartition(".")[2]
    models: dict[str, type[BaseModel]] = {"data": DatasetSettings, "distillation_config": type(configuration.method)}
    model, field = (models.get(top), name) if rest else (RunSettings, top)
    info = model.model_fields.get(field) if model else None
    if info is None or info.is_required():
        return False
    return to_jsonable_python(info.get_default(call_default_factory=True)) == value


def _may_change(key: str) -> bool:
    top, _, rest = key.partition(".")
    if top == "data":
        name = rest.rsplit(".", 1)[-1]
        return name in DATA_MAY_CHANGE or name.startswith(DATA_MAY_CHANGE_PREFIXES)
    if top == ROLES:
        return rest.rpartition(".")[2] in MAY_CHANGE
    return top in MAY_CHANGE or top.startswith(MAY_CHANGE_PREFIXES)


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of everything in a resolved configuration; datasets by their ids."""
    for key, value in values.items():
        if key == "data" and not prefix and isinstance(value, list):
            yield from flattened({entry["id"]: entry for entry in value}, "data.")
        elif isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
