"""What a run would do, without doing it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from ..utils.redaction import redacted
from . import options

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration

logger = logging.getLogger(__name__)


def print_plan(configuration: Configuration, registry: Registry) -> None:
    """Check the model's files and the output folder, then print notices (stderr) and the plan (stdout)."""
    from ..runs.builders import build_family, check_method_sources, completed_configuration
    from ..runs.output_folder import check_output_dir

    state = check_output_dir(configuration)
    check_method_sources(configuration, registry)
    family = build_family(configuration, registry)
    family.check_source()
    configuration = completed_configuration(configuration, registry, family)
    service, storage = (each(configuration, registry) for each in (options.service_notices, options.storage_notices))
    for notice in (*configuration.notices, *service, *storage, *state.notices):
        logger.info(notice)
    rows = [("output", f"{configuration.run.output_dir} ({state.action})"), *plan(configuration, registry)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(redacted(f"{name:<{width}}  {value}"))


def plan(configuration: Configuration, registry: Registry) -> Iterator[tuple[str, str]]:
    """Yield the plan as (what, how) rows."""
    run = configuration.run
    model = f"{run.pretrained_model_name_or_path}{' (miniature)' if configuration.miniature else ''}"
    yield "teacher", f"{model}, family {run.model_family}"
    trained = f"LoRA of rank {run.lora_rank}" if run.model_type == "lora" else "all weights"
    yield "student", f"{trained}, method {run.distillation_method}"
    for name, value in configuration.method.model_dump().items():
        yield f"  {name}", str(value)
    for entry in configuration.datasets:
        size = f"{entry.resolution:g} ({entry.resolution_type})"
        kind = "" if entry.has_images else "captions alone of "
        where = registry.get("data_backend", entry.type)(entry.backend).location
        own = f", {entry.train_batch_size} samples per micro-batch" if entry.train_batch_size else ""
        yield "data", f"{entry.id}: {kind}{where}, resolution {size}{own}"
    for entry in configuration.distillation_caches:
        how = f"{entry.num_inference_steps} steps of the teacher ({entry.solver}) at guidance {entry.guidance_scale:g}"
        yield "trajectories", f"{entry.id}: {how}, {entry.num_pairs_per_prompt} per caption and size"
    ends = [f"{run.max_train_steps} steps"] if run.max_train_steps else []
    ends += [f"{run.num_train_epochs} epochs"] if run.num_train_epochs else []
    batch = f"{run.train_batch_size} x {run.gradient_accumulation_steps} samples per step and process"
    yield "training", f"{' or '.join(ends)}, {batch}, {run.optimizer} at {run.learning_rate:g}"
    yield "precision", f"{run.mixed_precision}, device {run.device}"
    yield "validation", _every(run.validation_step_interval)
    yield "checkpoints", _every(run.checkpoint_step_interval)
    yield "trackers", ", ".join(run.report_to) or "none (metrics.jsonl alone)"


def _every(interval: int) -> str:
    return f"every {interval} steps" if interval else "off"
