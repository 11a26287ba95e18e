"""What the folder of a run holds, finished or not, gathered for its page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..drawing.curves import Curve, Floats, by_name, curve, short
from ..engine.metrics import read_metrics
from ..errors import UserError
from ..evaluation.result import format_score
from ..evaluation.sampling import describe_guidance
from ..runs.output_folder import EVALUATION, REPORTS_FOLDER, RESOLVED, STUDENT_FOLDER
from ..runs.run_log import Session, read_log
from ..settings.secrets import shown
from .images import Embedded, embedded

T = TypeVar("T")
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


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it says, and the number in full."""

    text: str
    full: str = ""


@dataclass(frozen=True)
class Scores:
    """Teacher against student."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]
    """(role, cells)."""
    about: str
    left_out: Mapping[str, str]
    image: Embedded | None


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
    scores: Scores | None = None
    datasets: list[DatasetPart] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    use: str = ""
    config: str = ""


class Reader:
    """Reads the parts of a run's folder one by one: one that is damaged is left out, and said."""

    def __init__(self) -> None:
        self.left_out: list[str] = []

    def read(self, file: Path, part: Callable[[Path], T], otherwise: T) -> T:
        """Return what `part` makes of a file; `otherwise` where there is no such file, or it cannot be read."""
        if not file.is_file():
            return otherwise
        try:
            return part(file)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.message if isinstance(error, UserError) else f"{file}: {type(error).__name__}: {error}"
            self.left_out.append(f"left out of this page, since it cannot be read: {reason}")
            return otherwise


def find(folder: Path) -> RunContents:
    """Read the folder of a run; what is damaged in it is left out, and said among the warnings.

    Raises:
        UserError: It is none, or its configuration is damaged.
    """
    if not (folder / RESOLVED).is_file():
        raise UserError(
            f"{folder} has no {RESOLVED}: it is not the output folder of a run that has begun",
            "give the output_dir of a `distill run`",
        )
    config, sessions, reader = _json(folder / RESOLVED), read_log(folder), Reader()
    figures = reader.read(folder / "metrics.jsonl", lambda file: by_name(read_metrics(file)), {})
    step = max((int(steps[-1]) for steps, _ in figures.values()), default=0)
    status, text = _status(sessions, step)
    names = sorted(figures, key=lambda name: (name in LATE, name != "loss"))
    grids = sorted((folder / "validation").glob("step-*/grid.png"))
    shown_grids = [reader.read(file, _grid, None) for file in spread(grids, MOST_GRIDS)]
    scores, datasets = _scores(folder, reader), list(_datasets(folder / REPORTS_FOLDER, reader))
    use = reader.read(folder / STUDENT_FOLDER / "README.md", _use, "")
    warnings, lines = _said(sessions)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    warnings += [(now, f"warning: {line}") for line in reader.left_out]
    return RunContents(
        folder.absolute().name, status, text, _facts(config, sessions, figures, step),
        curves=[curve(name, *figures[name]) for name in names[:MOST_CURVES]],
        curves_left_out=names[MOST_CURVES:],
        grids=[grid for grid in shown_grids if grid is not None], num_grids=len(grids),
        scores=scores, datasets=datasets,
        warnings=warnings[-MOST_WARNINGS:], lines=lines[-MOST_LINES:], use=use,
        config=json.dumps(shown("", config), indent=2, ensure_ascii=False)[:MOST_LETTERS],
    )  # fmt: skip


def _grid(file: Path) -> ValidationGrid:
    return ValidationGrid(int(file.parent.name[5:]), embedded(file, **GRID_SIZE))


def _sheet(file: Path) -> Embedded:
    return embedded(file, **SHEET_SIZE)


def spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly over all, with the first and the last."""
    positions = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in positions]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}", "restore it, or remove it to leave it out") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object", "restore it, or remove it to leave it out")
    return found


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


# -- scores ---------------------------------------------------------------------------------------------------------


def _scores(folder: Path, reader: Reader) -> Scores | None:
    found = reader.read(folder / EVALUATION[0], _table, None)
    return found and replace(found, image=reader.read(folder / EVALUATION[1], _sheet, None))


def _table(file: Path) -> Scores:
    """Read the scores of ``evaluation.json``."""
    found = _json(file)
    names = list(found["higher_is_better"])
    arrows = {True: "\N{NO-BREAK SPACE}↑", False: "\N{NO-BREAK SPACE}↓", None: ""}
    heads = [f"{name.replace('_', ' ')}{arrows[found['higher_is_better'][name]]}" for name in names]
    data = f"; distances to the data are to {found['num_data']:,} of its images" if found["num_data"] else ""
    return Scores(
        ["", "steps", "guidance", *heads, "seconds per image"],
        [(row["role"], _cells(row, names)) for row in found["rows"]],
        f"{found['num_samples']:,} images of {found['width']}x{found['height']} each, from the same noise, "
        f"on {found['device']}{data}. ↑: higher is better.",
        found["left_out"],
        None,
    )


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[Cell]:
    guidance = describe_guidance(row["guidance"]).removeprefix("guidance ").replace("no guidance", "none")
    numbers = [*(row["scores"].get(name) for name in names), row["seconds_per_image"]]
    return [
        Cell(row["name"]),
        Cell(str(row["steps"])),
        Cell(guidance),
        *(Cell(format_score(number), "" if number is None else str(number)) for number in numbers),
    ]


# -- data -----------------------------------------------------------------------------------------------------------


def _datasets(folder: Path, reader: Reader) -> Iterator[DatasetPart]:
    for file in sorted(folder.glob("*/report.json"))[:MOST_DATASETS]:
        part = reader.read(file, _dataset, None)
        if part is not None:
            sheet, charts = (reader.read(file.with_name(f"{name}.png"), _sheet, None) for name in SHEETS)
            yield replace(part, sheet=sheet, charts=charts)


def _dataset(file: Path) -> DatasetPart:
    found = _json(file)
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
