"""The model card of an exported student: how to use it, what it scores, how it was made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.sampling import describe_guidance, plural
from ..utils.files import save_image, write_text

if TYPE_CHECKING:
    from ..evaluation.result import Evaluation
    from ..plugin_api.family import ExportInfo, ModelFamily
    from ..settings.configuration import Configuration

CARD = "README.md"
GRID = "grid.png"
EVALUATION = "evaluation.png"

OF_A_FOLDER = ("output_dir", "overwrite", "resume_from_checkpoint")
"""Keys that say where the run lay and how it was started: the same run in another folder has the same card."""


def write_model_card(
    student: Path,
    configuration: Configuration,
    family: ModelFamily,
    info: ExportInfo,
    *,
    evaluation: Evaluation | None = None,
    grid: Path | None = None,
) -> Path:
    """Write ``student/README.md`` with its images beside it; returns it.

    Args:
        student: The exported student.
        configuration: The run's; folders of this machine are left out of what is shown.
        family: Knows the code that uses the student.
        info: As it was exported.
        evaluation: The scores at the end of the run, if any.
        grid: The last validation grid, if any.
    """
    if grid is not None:
        shutil.copyfile(grid, student / GRID)
    if evaluation is not None:
        save_image(evaluation.image(), student / EVALUATION)
    sections = [
        _front_matter(configuration, family),
        _introduction(configuration, info),
        f"## Use\n\n```python\n{family.usage_snippet(info).strip()}\n```",
        _images(grid is not None),
        _scores(evaluation),
        _training(configuration),
    ]
    write_text(student / CARD, "\n\n".join(section for section in sections if section) + "\n")
    return student / CARD


def _base_model(configuration: Configuration, family: ModelFamily) -> str:
    if configuration.miniature:
        return f"the {family.name} miniature that ships with distill"
    source = family.settings.source
    return Path(source).name if os.path.isabs(source) or Path(source).exists() else source


def _front_matter(configuration: Configuration, family: ModelFamily) -> str:
    from huggingface_hub import ModelCardData

    run, source = configuration.run, _base_model(configuration, family)
    on_hub = not configuration.miniature and source == family.settings.source  # a folder means nothing to others
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=source if on_hub else None,
        tags=["distill", "distillation", run.distillation_method, run.model_family, run.model_type],
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(configuration: Configuration, info: ExportInfo) -> str:
    run, sampler = configuration.run, info.sampler
    base = f"the {run.model_family} miniature that ships with distill" if configuration.miniature else "its teacher"
    kind = "A LoRA" if info.model_type == "lora" else "A full model"
    return (
        f"# {run.tracker_run_name or f'{run.model_family} {run.distillation_method}'}\n\n"
        f"{kind} that makes images in {plural(sampler.num_inference_steps, 'step')} with "
        f"{describe_guidance(sampler.guidance_scale)}, distilled from {base} with the method "
        f"`{run.distillation_method}` by distill (`pip install distill-engine`). "
        f"It runs with `{sampler.scheduler}`, whose settings lie in `scheduler/`.{_scale(info)}{_rounding(info)}"
    )


def _scale(info: ExportInfo) -> str:
    """Return the sentence about a LoRA whose alpha was not its rank while it was trained."""
    lora = info.lora
    if info.model_type != "lora" or lora is None or lora.alpha == lora.rank:
        return ""
    return (
        f" It was trained with alpha {lora.alpha:g} at rank {lora.rank}: this scale of {lora.alpha / lora.rank:.6g} is "
        "in its weights, so its strength is 1 wherever it is loaded, also where alpha is not heeded."
    )


def _rounding(info: ExportInfo) -> str:
    """Return the sentence about weights that were rounded when they were exported."""
    if info.rounding is None:
        return ""
    return f" Its weights are rounded to {info.dtype}: the norm of the difference is {info.rounding:.2g} of theirs."


def _images(has_grid: bool) -> str:
    if not has_grid:
        return ""
    return f"## Images\n\nTeacher at few steps, student, teacher in full, from the same noise:\n\n![grid]({GRID})"


def _scores(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    plan = evaluation.plan
    data = f" Distances to the data are to {evaluation.num_data} of its images." if evaluation.num_data else ""
    table = evaluation.markdown(times=False)
    return (
        f"## Scores\n\n{plural(plan.num_samples, 'image')} of {plan.width}x{plan.height} each, from the same noise, "
        f"on {evaluation.device}.{data} The teacher has one guidance throughout.\n\n{table}\n\n"
        f"![evaluation]({EVALUATION})"
    )


def _training(configuration: Configuration) -> str:
    resolved = {key: value for key, value in configuration.resolved().items() if key not in OF_A_FOLDER}
    shown = json.dumps(without_folders(resolved), indent=2, ensure_ascii=False)
    return (
        "## Training\n\n<details><summary>The configuration, folders left out</summary>\n\n"
        f"```json\n{shown}\n```\n\n</details>"
    )


def without_folders(value: Any) -> Any:
    """The value with every absolute path cut down to its last part: a card is for others, folders are local."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        return Path(value).name
    return value
