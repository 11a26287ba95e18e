"""What the folder of a run holds, finished or not, gathered for its page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..drawing.curves import Curve, Floats, Series, by_name, curve, short
from ..engine.metrics import read_metrics
from ..errors import UserError
from ..runs.output_folder import EVALUATION, REPORTS_FOLDER, RESOLVED, STUDENT_FOLDER
from ..runs.run_log import Session, read_log
from ..settings.secrets import shown
from .images import Embedded, embedded
from .reader import Reader, json_object
from .score_table import Scores, read_table
from .scored_validations import ScoredValidations, scored_validations

SHEETS = ("contact-sheet", "report")
MOST_CURVES = 30
MOST_GRIDS = 12
MOST_DATASETS = 8
MOST_WARNINGS, MOST_LINES = 100, 400
"""Lines of the log, the newest, that the page shows."""
MOST_LETTERS = 200_000
"""Of the configuration; it stands whole in its file."""
GRID_SIZE = {"widest": 1200, "highest": 2400}
SHEET_SIZE = {"widest": 1150, "highest": 1400}
INTERRUPTED = "Interrupted: "
LATE = ("samples_per_second", "wait_for_data_share")
"""Curves on the machine, not on the student, come last."""


@dataclass(frozen=True)
class ValidationGrid:
    """The images of one validation."""

    step: int
    image: Embedded
    score: str = ""
    """That validations are ranked by, in words."""
    best: bool = False

    @property
    def label(self) -> str:
        """The name that the page gives it."""
        return f"Step {self.step:,}"


@dataclass(frozen=True)
class DatasetPart:
    """One dataset: its figures and images."""

    id: str
    facts: list[tuple[str, str]]
    sheet: Embedded | None
    charts: Embedded | None


@dataclass
class RunContents:
    """Everything that the page shows.

    Attributes:
        name: Of the output folder.
        status: ``finished``, ``failed``, ``interrupted``, ``open`` (running, or killed), ``unknown`` (no log).
        status_text: The same in a sentence.
        facts: The headline: name and value.
        curves: Charts of the figures.
        curves_left_out: Names of those beyond the most that are shown.
        grids: Validations, the newest last.
        num_grids: How many there are on disk.
        validations: Their scores, if they have any.
        scores: The evaluation, if there is one.
        datasets: Reports on the data.
        warnings: (time, line), the newest last.
        lines: The rest of what was said.
        use: Code that uses the student, or nothing.
        config: As JSON.
    """

    name: str
    status: str
    status_text: str
    facts: list[tuple[str, str]]
    curves: list[Curve] = field(default_factory=list)
    curves_left_out: list[str] = field(default_factory=list)
    grids: list[ValidationGrid] = field(default_factory=list)
    num_grids: int = 0
    validations: ScoredValidations | None = None
    scores: Scores | None = None
    datasets: list[DatasetPart] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    use: str = ""
    config: str = ""

    @property
    def opens_at(self) -> int:
        """Place of the validation that is shown first: the best, or the last."""
        return next((place for place, grid in enumerate(self.grids) if grid.best), len(self.grids) - 1)


@dataclass(frozen=True)
class RunFolder:
    """What is read of a run's folder first.

    Attributes:
        path: Of the folder.
        config: As it was resolved.
        sessions: From its log.
        figures: Steps and values by name.
        step: The last that is known of.
        reader: Reads the rest.
    """

    path: Path
    config: Mapping[str, Any]
    sessions: Sequence[Session]
    figures: Mapping[str, tuple[Floats, Floats]]
    step: int
    reader: Reader

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Read it.

        Raises:
            UserError: It is none, or its configuration is damaged.
        """
        if not (path / RESOLVED).is_file():
            raise UserError(
                f"{path} has no {RESOLVED}: it is not the output folder of a run that has begun",
                "give the output_dir of a `distill run`",
            )
        config, sessions, reader = json_object(path / RESOLVED), read_log(path), Reader()
        figures = reader.read(path / "metrics.jsonl", lambda file: by_name(read_metrics(file)), {})
        step = max((int(steps[-1]) for steps, _ in figures.values()), default=0)
        return cls(path, config, sessions, figures, step, reader)

    @property
    def status(self) -> tuple[str, str]:
        """How the run ended: a word, and a sentence."""
        return _status(self.sessions, self.step)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The headline: name and value."""
        return _facts(self.config, self.sessions, self.figures, self.step)

    def scores(self) -> Scores | None:
        """Return the evaluation, without its image; None where there is none."""
        return self.reader.read(self.path / EVALUATION[0], read_table, None)

    def validations(self, scores: Scores | None) -> ScoredValidations | None:
        """Return the scores of the validations; None where there are none."""
        reference = scores.reference if scores else None
        return scored_validations(self.path, self.reader, last_step=self.step, reference=reference)


def find(folder: Path) -> RunContents:
    """Read the folder of a run; what is damaged in it is left out, and said among the warnings.

    Raises:
        UserError: It is none, or its configuration is damaged.
    """
    run = RunFolder.open(folder)
    figures, reader = run.figures, run.reader
    names = ordered(figures)
    scores = run.scores()
    validations = run.validations(scores)
    best = validations.best if validations else None
    grids = sorted((folder / "validation").glob("step-*/grid.png"))
    shown_grids = [reader.read(file, _grid, None) for file in spread(grids, MOST_GRIDS, also=best)]
    datasets = list(_datasets(folder / REPORTS_FOLDER, reader))
    use = reader.read(folder / STUDENT_FOLDER / "README.md", _use, "")
    image = reader.read(folder / EVALUATION[1], _sheet, None)
    warnings, lines = _said(run.sessions)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    warnings += [(now, f"warning: {line}") for line in reader.left_out]
    return RunContents(
        folder.absolute().name, *run.status, run.facts,
        curves=[curve(name, [Series("", *figures[name])]) for name in names[:MOST_CURVES]],
        curves_left_out=names[MOST_CURVES:],
        grids=[_scored(grid, validations) for grid in shown_grids if grid is not None], num_grids=len(grids),
        validations=validations, scores=scores and replace(scores, image=image), datasets=datasets,
        warnings=warnings[-MOST_WARNINGS:], lines=lines[-MOST_LINES:], use=use,
        config=json.dumps(shown("", run.config), indent=2, ensure_ascii=False)[:MOST_LETTERS],
    )  # fmt: skip


def ordered(names: Iterable[str]) -> list[str]:
    """Return the names of figures in the order of the page: the loss, the student's, the machine's."""
    return sorted(names, key=lambda name: (name in LATE, name != "loss"))


def _scored(grid: ValidationGrid, validations: ScoredValidations | None) -> ValidationGrid:
    """Return the images with the score of their step."""
    if validations is None:
        return grid
    return replace(grid, score=validations.says(grid.step), best=grid.step == validations.best)


def _grid(file: Path) -> ValidationGrid:
    return ValidationGrid(step_of(file), embedded(file, **GRID_SIZE))


def _sheet(file: Path) -> Embedded:
    return embedded(file, **SHEET_SIZE)


def spread(files: Sequence[Path], most: int, *, also: int | None = None) -> list[Path]:
    """Return at most so many files of steps, evenly over all, with the first, the last and that of step `also`."""
    wanted = [place for place, file in enumerate(files) if step_of(file) == also]
    return [files[place] for place in evenly(len(files), most, also=wanted)]


def evenly(count: int, most: int, *, also: Sequence[int] = ()) -> list[int]:
    """Return at most so many positions of `count`, evenly, with the first and the last, and with those of `also`."""
    positions = np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
    for wanted in also:
        if wanted not in positions:  # in the place of the nearest that is neither the first nor the last
            nearest = min((each for each in positions[1:-1] if each not in also), key=lambda other: abs(other - wanted))
            positions[positions.index(nearest)] = wanted
    return sorted(positions)


def step_of(file: Path) -> int:
    """Return the step of a file of a validation."""
    return int(file.parent.name[5:])


# -- the headline ---------------------------------------------------------------------------------------------------


def _status(sessions: Sequence[Session], step: int) -> tuple[str, str]:
    if not sessions:
        return "unknown", f"at step {step:,}; there is no log of how it ended"
    last = sessions[-1]
    if last.outcome is None:
        return "open", f"running, or killed, at step {step:,}; last heard of at {_clock(last)}"
    if not last.outcome:
        return "finished", f"finished at {_clock(last)}"
    if last.outcome.startswith(INTERRUPTED):
        return "interrupted", f"interrupted: {last.outcome.removeprefix(INTERRUPTED)}"
    return "failed", f"failed at step {step:,}: {last.outcome}"


def _clock(session: Session) -> str:
    return f"{session.last:%Y-%m-%d %H:%M} UTC"


def _facts(
    config: Mapping[str, Any], sessions: Sequence[Session], figures: Mapping[str, tuple[Floats, Floats]], step: int
) -> list[tuple[str, str]]:
    kind = f"LoRA of rank {config['lora_rank']}" if config["model_type"] == "lora" else "all weights"
    wanted = config["max_train_steps"]
    steps = f"{step:,} of {wanted:,}" if wanted else f"{step:,}"
    facts = [
        ("method", config["distillation_method"]),
        ("family", config["model_family"]),
        ("model", Path(config["pretrained_model_name_or_path"]).name),
        ("trains", kind),
        ("steps", steps),
    ]
    if sessions:
        starts = f" in {len(sessions)} starts" if len(sessions) > 1 else ""
        facts.append(("time", duration(sum(session.seconds for session in sessions)) + starts))
    if "samples_per_second" in figures:
        facts.append(("samples per second", short(float(np.median(figures["samples_per_second"][1])))))
    if "loss" in figures:
        facts.append(("last loss", short(float(figures["loss"][1][-1]))))
    return [(name, str(value)) for name, value in facts]


def duration(seconds: float) -> str:
    """``48 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# -- data -----------------------------------------------------------------------------------------------------------


def _datasets(folder: Path, reader: Reader) -> Iterator[DatasetPart]:
    for file in sorted(folder.glob("*/report.json"))[:MOST_DATASETS]:
        part = reader.read(file, _dataset, None)
        if part is not None:
            sheet, charts = (reader.read(file.with_name(f"{name}.png"), _sheet, None) for name in SHEETS)
            yield replace(part, sheet=sheet, charts=charts)


def _dataset(file: Path) -> DatasetPart:
    found = json_object(file)
    return DatasetPart(found["id"], list(_figures(found)), None, None)


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"{found['noun']}s used", f"{found['used']:,} of {found['found']:,}"
    yield "different captions", f"{found['different_captions']:,}"
    if found["buckets"]:
        yield "buckets", f"{len(found['buckets']):,}"
    yield from ((f"left out: {reason}", f"{number:,}") for reason, number in found["left_out"].items())
    if found["broken"]:
        yield "broken", f"{len(found['broken']):,}"
    if found["without_caption"]:
        yield "without a caption", f"{len(found['without_caption']):,}"


# -- what was said, and how to go on ----------------------------------------------------------------------------------


def _said(sessions: Sequence[Session]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Warnings, and the rest."""
    warnings: list[tuple[str, str]] = []
    lines: list[tuple[str, str]] = []
    for session in sessions:
        for time, line in session.lines:
            (warnings if line.startswith("warning") else lines).append((f"{time:%Y-%m-%d %H:%M:%S}", line))
        if session.outcome:
            warnings.append((f"{session.last:%Y-%m-%d %H:%M:%S}", session.outcome))
    return warnings, lines


def _use(card: Path) -> str:
    """Return the code of the student's model card."""
    found = re.search(r"^```python\n(.*?)^```", card.read_text(encoding="utf-8"), re.S | re.M)
    return found[1].strip() if found else ""
