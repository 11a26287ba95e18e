"""What happens after the last step: export, scores, model card, publishing."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DistillError
from ..plugin_api.family import ExportInfo
from ..utils.files import whole_folder
from ..utils.progress import working
from ..utils.safetensors_header import sort_metadata
from .builders import export_dtype, lora_settings
from .model_card import write_model_card

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..evaluation.result import Evaluation
    from ..plugin_api.precision import Precision
    from .components import RunComponents

logger = logging.getLogger(__name__)


def export_info(
    run: RunComponents, *, role: str | None = None, dtype: Precision | None = None, rounding: float | None = None
) -> ExportInfo:
    """Return how a student is exported, and what beside the weights: sampler, shape of the adapter, origin.

    Args:
        run: The run.
        role: Whose weights; the method's result unless given.
        dtype: Type of the exported weights; None for the one that is trained.
        rounding: Relative norm of what that type rounds away.
    """
    settings = run.settings
    return ExportInfo(
        sampler=run.sampler(),
        model_type=settings.model_type,
        lora=lora_settings(run.config),
        adapter=role or run.method.result_role(),
        metadata={"distillation_method": settings.distillation_method, "steps": str(run.trainer.step)},
        dtype=dtype,
        rounding=rounding,
    )


def export_student(run: RunComponents, student: Path, *, role: str | None = None) -> ExportInfo | None:
    """Write a student to a temporary folder and move it into place, so that what is there is whole.

    Args:
        run: The run.
        student: Where it goes.
        role: Whose weights; the method's result unless given.

    Returns:
        As it was exported; None on processes that export nothing.
    """
    with run.strategy.exported(run.networks, role or run.method.result_role()) as network:
        return None if network is None else _write(run, network, student, role=role)


def _rounded_info(run: RunComponents, network: nn.Module, *, role: str | None) -> ExportInfo:
    """Return how `network` is exported: in the run's type, or, where that is ``auto`` and cannot hold its values, as it
    was trained.

    Raises:
        DistillError: A type that was asked for cannot hold the values.
    """
    dtype, name = export_dtype(run.settings), role or run.method.result_role()
    if dtype is None:
        return export_info(run, role=role)
    adapter = run.settings.model_type == "lora"
    lost = rounding([value for key, value in network.named_parameters() if not adapter or f".{name}." in key], dtype)
    if math.isfinite(lost):
        return export_info(run, role=role, dtype=dtype, rounding=lost or None)
    said = f"the student has weights that {dtype} cannot hold"
    if run.settings.export_dtype != "auto":
        raise DistillError(f"export_dtype = {dtype!r}: {said}\n  set export_dtype=float32, or auto")
    logger.warning(f"{said}: it is exported in the type that was trained (export_dtype = auto)")
    return export_info(run, role=role)


def rounding(weights: Iterable[Tensor], dtype: Precision) -> float:
    """Return the norm of what rounding to `dtype` takes away, over the norm of all weights; not finite where the type
    cannot hold a value.
    """
    import torch

    lost = whole = 0.0
    for weight in weights:
        wide = weight.detach().double()
        lost += float((weight.detach().to(getattr(torch, dtype)).double() - wide).square().sum())
        whole += float(wide.square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def _write(run: RunComponents, network: nn.Module, student: Path, *, role: str | None) -> ExportInfo:
    info = _rounded_info(run, network, role=role)
    with whole_folder(student) as temporary:
        with working(f"writing {student.name}/"):
            run.family.export(network, temporary, info)
        for file in temporary.rglob("*.safetensors"):
            sort_metadata(file)
    logger.info(f"student written to {student}{_in_type(info)}")
    return info


def _in_type(info: ExportInfo) -> str:
    return "" if info.rounding is None else f" in {info.dtype}, which rounds away {info.rounding:.2g} of its norm"


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


def publish_student(run: RunComponents, student: Path, info: ExportInfo, evaluation: Evaluation | None) -> None:
    """Write the model card and hand the folder to the publishers; a publisher's failure is a warning.

    Args:
        run: The run.
        student: The exported student.
        info: As it was exported.
        evaluation: Its scores, if any.
    """
    grid = last_grid(run.settings.output_dir)
    write_model_card(student, run.config, run.family, info, evaluation=evaluation, grid=grid)
    run.publishers.publish(student)


def last_grid(output_dir: Path) -> Path | None:
    """The newest validation's side-by-side image."""
    grids = sorted((output_dir / "validation").glob("step-*/grid.png"))
    return grids[-1] if grids else None
