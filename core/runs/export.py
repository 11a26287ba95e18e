"""What happens after the last step: export, scores, model card, publishing."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..plugin_api.family import ExportInfo
from ..utils.progress import working
from ..utils.safetensors_header import sort_metadata
from .builders import lora_settings
from .model_card import write_model_card

if TYPE_CHECKING:
    from torch import nn

    from ..evaluation.result import Evaluation
    from .components import RunComponents

logger = logging.getLogger(__name__)


def export_info(run: RunComponents, *, role: str | None = None) -> ExportInfo:
    """Return what is exported beside the weights: sampler, shape of the adapter, origin."""
    settings = run.settings
    return ExportInfo(
        sampler=run.sampler(),
        model_type=settings.model_type,
        lora=lora_settings(run.config),
        adapter=role or run.method.result_role(),
        metadata={"distillation_method": settings.distillation_method, "steps": str(run.trainer.step)},
    )


def export_student(run: RunComponents, student: Path, *, role: str | None = None) -> None:
    """Write a student to a temporary folder and move it into place, so that what is there is whole.

    Args:
        run: The run.
        student: Where it goes.
        role: Whose weights; the method's result unless given.
    """
    with run.strategy.exported(run.networks, role or run.method.result_role()) as network:
        if network is not None:
            _write(run, network, student, role=role)


def _write(run: RunComponents, network: nn.Module, student: Path, *, role: str | None) -> None:
    temporary, replaced = (student.with_name(f".{student.name}.{state}") for state in ("partial", "replaced"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with working(f"writing {student.name}/"):
            run.family.export(network, temporary, export_info(run, role=role))
        for file in temporary.rglob("*.safetensors"):
            sort_metadata(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not to be kept full by half a student
        raise
    if student.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        student.rename(replaced)
    temporary.rename(student)
    shutil.rmtree(replaced, ignore_errors=True)
    logger.info(f"student written to {student}")


def export_online(run: RunComponents, folder: Path) -> None:
    """Write the weights that the optimizer stepped, where the student is an average of them."""
    result = run.networks.roles[run.method.result_role()]
    if result.ema_of is None and run.networks.average is None:
        logger.info("export_online_weights has no effect: the student is no average")
        return
    export_student(run, folder, role=result.ema_of or result.name)


def evaluate_student(run: RunComponents) -> Evaluation:
    """Teacher against student, as a table, as evaluation.json and as an image, and to the trackers."""
    from ..evaluation.evaluate_run import ComparisonData, EvaluationSize, Subject, evaluate_run

    prompts = run.data.captions(run.settings.evaluation_num_samples) or run.prompts
    any_process = run.processes.any if run.strategy.lockstep else bool
    with working("scoring the student against its teacher"):
        evaluation = evaluate_run(
            run.config, run.registry, Subject(run.family, run.method, run.networks, any_process=any_process),
            ComparisonData(prompts, run.data.real_images), EvaluationSize(resolution=run.resolution),
        )  # fmt: skip
    if not run.processes.main:
        return evaluation
    evaluation.save(run.settings.output_dir)
    run.trackers.images("evaluation", {"teacher and student": evaluation.image()}, run.trainer.step)
    run.trackers.text("evaluation", evaluation.markdown(), run.trainer.step)
    return evaluation


def publish_student(run: RunComponents, student: Path, evaluation: Evaluation | None) -> None:
    """Write the model card and hand the folder to the publishers; a publisher's failure is a warning."""
    grid = last_grid(run.settings.output_dir)
    write_model_card(student, run.config, run.family, export_info(run), evaluation=evaluation, grid=grid)
    run.publishers.publish(student)


def last_grid(output_dir: Path) -> Path | None:
    """The newest validation's side-by-side image."""
    grids = sorted((output_dir / "validation").glob("step-*/grid.png"))
    return grids[-1] if grids else None
