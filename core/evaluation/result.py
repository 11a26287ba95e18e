"""The result of an evaluation, for programs (JSON), for people (table, image) and for trackers (scalars)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plan import EvaluationPlan
from .sampling import SamplingPlan, describe_guidance, plural

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

    from .plan import EvaluationPlan

SCHEMA = 1


@dataclass(frozen=True)
class ValidationReference:
    """The full teacher's scores on the samples that validation scores the student on.

    Attributes:
        steps: Of the teacher.
        samples: :meth:`.plan.SampleSet.identity` of the samples.
        scores: By name.
    """

    steps: int
    samples: Mapping[str, Any]
    scores: Mapping[str, float]


@dataclass
class Evaluation:
    """The result, with rows in the order of the image's columns: teacher at few steps, fast solver, student, full
    teacher.

    Attributes:
        plan: The images that were made.
        rows: One per sampling plan.
        higher_is_better: For each score.
        left_out: Evaluators that could not be used, with the reason.
        num_data: Real images that distances are measured to.
        device: The device that it ran on.
        loras: LoRAs that stood beside the student's, in the teacher as well: path -> weight.
        validation_reference: What scores of the student at validation are compared with, if there are any.
    """

    plan: EvaluationPlan
    rows: list[Row]
    higher_is_better: Mapping[str, bool]
    left_out: Mapping[str, str] = field(default_factory=dict)
    num_data: int = 0
    device: str = "cpu"
    loras: Mapping[str, float] = field(default_factory=dict)
    validation_reference: ValidationReference | None = None

    @property
    def score_names(self) -> list[str]:
        """The names of all scores that any row has, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def to_json(self) -> dict[str, Any]:
        """Return everything but the images as JSON values."""
        plan, reference = self.plan, self.validation_reference
        beside = {"validation_reference": asdict(reference)} if reference else {}
        return {
            "schema": SCHEMA,
            "num_samples": plan.num_samples,
            "num_data": self.num_data,
            "seed": plan.seed,
            "width": plan.width,
            "height": plan.height,
            "device": self.device,
            "loras": dict(self.loras),
            "higher_is_better": {name: self.higher_is_better.get(name) for name in self.score_names},
            "left_out": dict(self.left_out),
            "prompts": list(plan.prompts),
            "rows": [_row_json(row) for row in self.rows],
            **beside,
        }

    def scalars(self) -> dict[str, float]:
        """Return scores by slash-separated name, as ``scores/student_4_steps/prompt_agreement_judge``."""
        found = {}
        for row in self.rows:
            sampling_plan = row.sampling_plan
            who = (
                f"{sampling_plan.name} {plural(sampling_plan.steps, 'step')}".replace(",", "")
                .replace("+", "p")
                .replace(" ", "_")
            )
            values = {**row.scores, "seconds_per_image": row.seconds_per_image, "seconds_single": row.seconds_single}
            found |= {f"scores/{who}/{name}": value for name, value in values.items()}
        return found

    def table(self) -> Table:
        """Make a table for a terminal of eighty columns: a row for each score, a column for each sampling plan."""
        from rich import box
        from rich.table import Table

        table = Table(title=self._title(), box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
        table.add_column("", max_width=26, overflow="fold")
        for row in self.rows:
            name = row.sampling_plan.name.rsplit(", ", 1)[-1]
            table.add_column(f"{name}\n{plural(row.sampling_plan.steps, 'step')}", justify="right", no_wrap=True)
        table.add_row("guidance", *(_guidance(row.sampling_plan.guidance) for row in self.rows))
        for score in self.score_names:
            cells = [format_score(row.scores.get(score)) for row in self.rows]
            table.add_row(self._header(score).replace("\n", " "), *cells)
        for label, field_name in (("seconds per image", "seconds_per_image"), ("alone", "seconds_single")):
            table.add_row(label, *(format_score(getattr(row, field_name)) for row in self.rows))
        return table

    def markdown(self, *, times: bool = True) -> str:
        """Return the table in Markdown.

        Args:
            times: Whether it has the seconds per image, which differ each time: a model card is to be the same file.
        """
        heads = ["", "steps", "guidance", *(self._header(name).replace("\n", " ") for name in self.score_names)]
        rows = []
        for row in self.rows:
            cells = [row.sampling_plan.name, str(row.sampling_plan.steps), _guidance(row.sampling_plan.guidance)]
            cells += [format_score(row.scores.get(name)) for name in self.score_names]
            rows.append([*cells, format_score(row.seconds_per_image)] if times else cells)
        heads += ["seconds per image"] * times
        return "\n".join([_line(heads), f"|{' --- |' * len(heads)}", *map(_line, rows)])

    def _header(self, score: str) -> str:
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better.get(score)]
        return score.replace("_", " ").replace(" to ", "\nto ", 1) + arrow

    def _title(self) -> str:
        plan = self.plan
        data = f", distances to {self.num_data} images of the data" if self.num_data else ""
        images = plural(plan.num_samples, "image")
        return f"Teacher and student: {images} each from the same noise, {plan.width}x{plan.height}{data}"

    def image(self) -> Image:
        """Draw the first prompts, with a column for each sampling plan."""
        from ..drawing.grid import GridRow, labelled_grid

        plan = self.plan
        shown = len(self.rows[0].images)
        rows = [
            GridRow(prompt, [row.images[index] for row in self.rows], f"seed {seed}")
            for index, (prompt, seed) in enumerate(zip(plan.sample_prompts[:shown], plan.seeds, strict=False))
        ]
        columns = [row.sampling_plan.label for row in self.rows]
        beside = ", ".join(f"{Path(path).name} x {weight:g}" for path, weight in self.loras.items())
        return labelled_grid(
            rows,
            columns,
            title="Teacher and student from the same noise" + (f", with {beside}" if beside else ""),
            footer=f"The first {shown} of {plan.num_samples} samples, not chosen. {plan.width}x{plan.height} pixels.",
            largest_cell=256,
        )

    @staticmethod
    def files(suffix: str = "") -> list[str]:
        """Return the names of the files that :meth:`save` writes."""
        return [f"evaluation{suffix}{ending}" for ending in (".json", ".png")]

    def save(self, folder: Path, *, suffix: str = "") -> list[Path]:
        """Write ``evaluation.json`` and ``evaluation.png`` (with `suffix`), each whole or not at all; return their
        paths.
        """
        from ..utils.files import save_image, write_text

        files = [folder / name for name in self.files(suffix)]
        write_text(files[0], json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        save_image(self.image(), files[1])
        return files


def _row_json(row: Row) -> dict[str, Any]:
    sampling_plan = row.sampling_plan
    return {
        "name": sampling_plan.name,
        "role": sampling_plan.role,
        "steps": sampling_plan.steps,
        "guidance": sampling_plan.guidance,
        "scheduler": sampling_plan.sampler.scheduler if sampling_plan.sampler else None,
        "scores": row.scores,
        "seconds_per_image": row.seconds_per_image,
        "seconds_single": row.seconds_single,
    }


def _guidance(value: float) -> str:
    return describe_guidance(value).removeprefix("guidance ").replace("no guidance", "none")


def format_score(value: float | None) -> str:
    """Format a score with three significant digits, in plain notation where that is readable; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


@dataclass
class Row:
    """The result of one sampling plan."""

    sampling_plan: SamplingPlan
    scores: dict[str, float] = field(default_factory=dict)
    seconds_per_image: float = 0.0
    """Seconds per image in batches of ``batch_size``, after a warm-up, without text encoding."""
    seconds_single: float = 0.0
    """Seconds for one image by itself, after a warm-up, without text encoding."""
    images: list[Image] = field(default_factory=list)
    """The first few images, for people."""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
