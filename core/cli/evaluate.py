"""`distill evaluate`: teacher against student, after a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .options import BasePrecisionOption, SetOption, overrides

if TYPE_CHECKING:
    from ..evaluation.evaluate_run import ComparisonData
    from ..plugin_api.family import ModelFamily
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration

logger = logging.getLogger(__name__)


def evaluate(
    output_dir: Annotated[Path, typer.Argument(help="The output folder of a finished run.")],
    steps: Annotated[
        str | None, typer.Option(help="Numbers of steps of the student, as 1,2,4,8; the run's by default.")
    ] = None,
    teacher_steps: Annotated[
        str | None, typer.Option(help="Numbers of steps of the teacher, as 4,50; the largest is the full teacher.")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Number of images for each score; by default that of the run.")
    ] = None,
    evaluators: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Evaluators, as clip_score,fid; the run's by default.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:WEIGHT]", help="LoRA to add to both the student and the teacher; can be given several times."
        ),
    ] = None,
    set_: SetOption = None,
    base_model_precision: BasePrecisionOption = None,
) -> None:
    """Score a finished run's student against its teacher: a table, evaluation.json and evaluation.png."""
    student_steps, full_steps = read_steps("--steps", steps), read_steps("--teacher-steps", teacher_steps)
    from rich.console import Console

    from ..evaluation.evaluate_run import EvaluationSize, Subject, evaluate_run
    from ..evaluation.evaluators import require_evaluators
    from ..runs.builders import build_family, build_method
    from ..runs.finished import ExportedNetworks, open_run, parse_loras
    from ..runs.run_files import RunFiles
    from ..runs.run_lock import note_while_running

    loras = parse_loras(lora or [])
    note_while_running(output_dir)
    named = overrides(evaluators=evaluators, base_model_precision=base_model_precision)
    configuration, registry = open_run(output_dir, overrides=[*(set_ or ()), *named])
    if evaluators is not None:
        require_evaluators(registry, configuration)
    family = build_family(configuration, registry)
    count = num_samples or configuration.run.evaluation_num_samples
    data = _data(configuration, registry, family, count)
    networks = ExportedNetworks(family, output_dir / "student", extra_loras=loras)
    weights = {extra.path: extra.weight for extra in loras}
    subject = Subject(family, build_method(configuration, registry, family), networks, weights)
    found = evaluate_run(configuration, registry, subject, data, EvaluationSize(student_steps, full_steps, num_samples))
    Console().print(found.table())
    for name, reason in found.left_out.items():
        logger.info(f"evaluator {name} is left out: {reason}")
    suffix = _suffix(bool(loras), base_model_precision)
    with RunFiles(output_dir).writing(*found.files(suffix)):
        for file in found.save(output_dir, suffix=suffix):
            logger.info(f"wrote {file}")


def _suffix(with_loras: bool, precision: str | None) -> str:
    """Return the suffix that tells the files apart from those of the run as it was."""
    return ("-with-lora" if with_loras else "") + (f"-{precision}-base" if precision else "")


def read_steps(option: str, text: str | None) -> tuple[int, ...] | None:
    """``1,2,4`` as numbers; None for None.

    Raises:
        UserError: It is something else.
    """
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or max(numbers) > 1000:
        raise UserError(f"{option} {text}: not a list of numbers of steps", f"write {option} 1,2,4,8 (each 1 to 1000)")
    return numbers


def _data(configuration: Configuration, registry: Registry, family: ModelFamily, count: int) -> ComparisonData:
    """Return captions and images of the run's data; the validation prompts and no images where it cannot be read."""
    from ..evaluation.evaluate_run import ComparisonData
    from ..runs.builders import build_pipeline

    pipeline = build_pipeline(configuration, registry, family=family, trajectories=False)
    try:
        pipeline.prepare()
    except UserError as error:
        logger.warning(f"the data cannot be read, so distances to it are left out: {error}")
        return ComparisonData(configuration.validation_prompts)
    return ComparisonData(pipeline.captions(count), pipeline.real_images)
