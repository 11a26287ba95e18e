"""What happens after the last step: export, scores, model card, publishing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .assemble import evaluation_setting, lora_settings
from .family import ExportInfo
from .model_card import write_model_card

if TYPE_CHECKING:
    from .evaluation_report import Evaluation
    from .run import Run

NUM_REAL_IMAGES = 1000
"""Real pictures that distances are measured to, at most."""


def export_info(run: Run) -> ExportInfo:
    """What goes along with the student: its sampler, the shape of its adapter, where it comes from."""
    settings = run.settings
    return ExportInfo(
        sampler=run.sampler(),
        model_type=settings.model_type,
        lora=lora_settings(run.config),
        adapter=run.method.result_role(),
        metadata={"distillation_method": settings.distillation_method, "steps": str(run.trainer.step)},
    )


def export_student(run: Run, student: Path) -> None:
    """Write ``student/`` aside and move it into place, so that what is there is whole."""
    aside = student.with_name(".student.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with run.networks.use(run.method.result_role()) as network:
        run.family.export(network, aside, export_info(run))
    if student.exists():
        shutil.rmtree(student)
    aside.rename(student)
    run.say(f"student written to {student}")


def evaluate_student(run: Run) -> Evaluation:
    """Teacher against student, as a table, as evaluation.json and as a picture, and to the trackers."""
    from .evaluation import build_evaluators, evaluate, plan_evaluation

    settings = run.settings
    plan = plan_evaluation(
        run.family, run.sampler, prompts=run.prompts, num_samples=settings.evaluation_num_samples, seed=settings.seed,
        resolution=run.resolution, steps=settings.evaluation_steps, teacher_steps=settings.evaluation_teacher_steps,
        teacher_guidance=settings.evaluation_teacher_guidance, role=run.method.result_role(),
    )  # fmt: skip
    evaluators, left_out = build_evaluators(run.registry, run.config, evaluation_setting(run.family))
    data = run.data.real_images(NUM_REAL_IMAGES, *run.resolution)
    evaluation = evaluate(run.family, run.networks, plan, evaluators, data=data, say=run.say, left_out=left_out)
    evaluation.save(settings.output_dir)
    run.trackers.images("evaluation", {"teacher and student": evaluation.picture()}, run.trainer.step)
    run.trackers.log(evaluation.scalars(), run.trainer.step)
    run.trackers.text("evaluation", evaluation.markdown(), run.trainer.step)
    return evaluation


def publish_student(run: Run, student: Path, evaluation: Evaluation | None) -> None:
    """Write the model card and hand the folder to the publishers; a publisher's failure is a warning."""
    grids = sorted((run.settings.output_dir / "validation").glob("step-*/grid.png"))
    write_model_card(
        student, run.config, run.family, export_info(run), evaluation=evaluation, grid=grids[-1] if grids else None
    )
    run.publishers.publish(student)
