"""Two runs side by side, gathered for their page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..drawing.curves import Curve, Series, curve
from ..errors import UserError
from ..runs.output_folder import flattened
from ..settings.secrets import shown
from .pairs import MOST_ROWS, Pair, ValidationImages, common_shots, paired
from .run_contents import MOST_CURVES, RunFolder, ordered
from .score_table import Cell, Scores, cells, heads
from .scored_validations import ScoredValidations

OF_THE_PLACE = {"output_dir", "overwrite", "resume_from_checkpoint", "tracker_run_name"}
"""Settings that say where a run lies, not what it does."""
MOST_SETTINGS = 100
MOST_VALUE_LETTERS = 200
NOT_SET = "–"


@dataclass
class Comparison:
    """Everything that the page of two runs shows; what is one of each run stands in their order.

    Attributes:
        labels: The runs' names, made different.
        statuses: (word, sentence) of each.
        facts: The headline: name, and value of each.
        curves: Charts of the figures of both.
        curves_left_out: Names of those beyond the most that are shown.
        score_curves: Charts of the scores of validations.
        verdicts: Sentences on the best validation: (label, sentence, its class in the page).
        score_notes: How to read them.
        pairs: Validations beside each other.
        pairs_note: What they do not show.
        heads: Of the table of final scores.
        rows: (role, cells) of it.
        tables_note: How to read it.
        settings: Key, and value of each run, of settings that differ.
        settings_left_out: How many more there are.
        warnings: What could not be read.
    """

    labels: tuple[str, str]
    statuses: list[tuple[str, str]]
    facts: list[tuple[str, list[str]]]
    curves: list[Curve]
    curves_left_out: list[str]
    score_curves: list[Curve] = field(default_factory=list)
    verdicts: list[tuple[str, str, str]] = field(default_factory=list)
    score_notes: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    pairs_note: str = ""
    heads: list[str] = field(default_factory=list)
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    tables_note: str = ""
    settings: list[tuple[str, str, str]] = field(default_factory=list)
    settings_left_out: int = 0
    warnings: list[str] = field(default_factory=list)


def compare(one: Path, two: Path) -> Comparison:
    """Read the folders of two runs.

    Raises:
        UserError: One of them is none, or has no validation, or both are the same.
    """
    if one.resolve() == two.resolve():
        raise UserError(f"{one} and {two} are the same run", "name two output folders, or one alone for its own report")
    runs, labels = (RunFolder.open(one), RunFolder.open(two)), labels_of(one, two)
    tables = [run.scores() for run in runs]
    validations = [run.validations(table) for run, table in zip(runs, tables, strict=True)]
    images = tuple(
        ValidationImages.find(label, run.path, best=scored.best if scored else None)
        for label, run, scored in zip(labels, runs, validations, strict=True)
    )
    for run, found in zip(runs, images, strict=True):
        if not found.steps:
            raise UserError(
                f"{run.path} has no validation (validation_step_interval = "
                f"{run.config.get('validation_step_interval', NOT_SET)}), so there is nothing to lay side by side",
                "wait for its first validation, or write its own report: distill report RUN",
            )
    names = ordered({name: None for run in runs for name in run.figures})
    settings = differing(*(run.config for run in runs))
    comparison = Comparison(
        labels, [run.status for run in runs], _facts(runs),
        curves=[curve(name, _series(name, runs, labels)) for name in names[:MOST_CURVES]],
        curves_left_out=names[MOST_CURVES:],
        settings=settings[:MOST_SETTINGS], settings_left_out=max(0, len(settings) - MOST_SETTINGS),
        warnings=[line for run in runs for line in run.reader.left_out],
    )  # fmt: skip
    _add_validations(comparison, validations)
    _add_pairs(comparison, (images[0], images[1]))
    _add_tables(comparison, tables)
    return comparison


def labels_of(one: Path, two: Path) -> tuple[str, str]:
    """Return the shortest ends of two paths that differ."""
    first, second = one.resolve().parts, two.resolve().parts
    length = 1
    while first[-length:] == second[-length:]:
        length += 1
    return "/".join(first[-length:]), "/".join(second[-length:])


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the settings that differ between two resolved configurations: dotted key, and both values as text."""
    flat = [dict(flattened(shown("", config))) for config in (one, two)]  # type: ignore[arg-type]
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if key not in OF_THE_PLACE]
    values = [(key, *(_text(each[key]) if key in each else NOT_SET for each in flat)) for key in keys]
    return [(key, first, second) for key, first, second in values if first != second]


def _text(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= MOST_VALUE_LETTERS else f"{text[:MOST_VALUE_LETTERS]} …"


def _facts(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    each = [dict(run.facts) for run in runs]
    return [(name, [facts.get(name, NOT_SET) for facts in each]) for name in dict.fromkeys([*each[0], *each[1]])]


def _series(name: str, runs: Sequence[RunFolder], labels: Sequence[str]) -> list[Series]:
    return [
        Series(label, *run.figures[name], number=number)
        for number, (run, label) in enumerate(zip(runs, labels, strict=True))
        if name in run.figures
    ]


def _add_validations(comparison: Comparison, found: Sequence[ScoredValidations | None]) -> None:
    having = [
        (number, label, scored)
        for number, (label, scored) in enumerate(zip(comparison.labels, found, strict=True)) if scored
    ]  # fmt: skip
    for name in dict.fromkeys(name for _, _, scored in having for name in scored.course.names):
        scoring = [(number, label, scored) for number, label, scored in having if name in scored.course.names]
        levels = {scored.levels[name]: label for _, label, scored in reversed(scoring) if name in scored.levels}
        marked = [
            (f"{said}, of {label}" if len(levels) > 1 else said, value) for (said, value), label in levels.items()
        ]
        better = scoring[0][2].better(name)
        series = [scored.series(name, label=label, number=number) for number, label, scored in scoring]
        comparison.score_curves.append(curve(name, series, marked, better=better))
    for _, label, scored in having:
        verdicts = (scored.verdict, "verdict"), (scored.worse, "verdict worse")
        comparison.verdicts += [(label, said, kind) for said, kind in verdicts if said]
        comparison.score_notes += [note for note in scored.notes if note not in comparison.score_notes]
    for label, scored in zip(comparison.labels, found, strict=True):
        if having and scored is None:
            comparison.verdicts.append((label, "Its validations are not scored (validation_scores).", "note"))
    if len(having) == 2 and having[0][2].course.samples != having[1][2].course.samples:
        comparison.score_notes.insert(0, "The runs were scored on other samples: their values do not compare.")


def _add_pairs(comparison: Comparison, images: tuple[ValidationImages, ValidationImages]) -> None:
    comparison.pairs = paired(images)
    count = len(common_shots(images))
    if not count:
        comparison.pairs_note = "The runs were validated on other prompts, sizes or noise: no image has a counterpart."
    elif count > MOST_ROWS:
        comparison.pairs_note = f"The first {MOST_ROWS} of {count} images that both runs made at each validation."


def _add_tables(comparison: Comparison, found: Sequence[Scores | None]) -> None:
    tables = [(label, table) for label, table in zip(comparison.labels, found, strict=True) if table]
    better = {name: up for _, table in tables for name, up in table.higher_is_better.items()}
    comparison.heads = ["", "", *heads(better)]
    comparison.rows = [
        (row["role"], [Cell(label), *cells(row, list(better))]) for label, table in tables for row in table.plain
    ]
    comparison.tables_note = " ".join(dict.fromkeys(table.about for _, table in tables))
    missing = [label for label, table in zip(comparison.labels, found, strict=True) if not table]
    if missing:
        comparison.tables_note += f" {' and '.join(missing)} is not evaluated yet."
