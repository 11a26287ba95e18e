"""A dataset's report: tables, charts and a contact sheet, written where a person looks before training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...drawing.charts import Panel, draw
from ...drawing.grid import BACKGROUND, EMPTY, FAINT, INK, MARGIN, font, line_height, shorten, wrap
from ...errors import OutOfReach
from ...utils.files import save_image, write_text
from ...utils.redaction import redacted
from ...utils.seeds import derive_seed
from ..dataset import Dataset
from ..hashing import permute
from ..samples.file_checks import printable
from ..samples.images import BrokenImage
from .statistics import DatasetStatistics, Histogram, Spread, statistics_of
from .summary import named_with_reasons

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
SHEET_SAMPLES, SHEET_COLUMNS, CELL = 24, 6, 176
CAPTION_LINES, CAPTION_LETTERS = 3, 300
NAMED = 100
"""Broken samples, and samples without a caption, that the page names; the JSON file has all of the former."""
MOST_BUCKETS = 24
"""Buckets with a bar, or a row, of their own."""


@dataclass(frozen=True)
class Sample:
    """One cell of the contact sheet: a small image, or why there is none, and the first caption."""

    image: Image | None
    caption: str
    note: str = ""


@dataclass(frozen=True)
class DatasetReport:
    """The report that was written for one dataset.

    Attributes:
        id: The dataset's.
        folder: Holds the three files.
        text: ``report.md``.
        images: By caption: charts, and the contact sheet where there are images.
    """

    id: str
    folder: Path
    text: str
    images: Mapping[str, Image]


def write_reports(datasets: Sequence[tuple[Dataset, int]], folder: Path) -> list[DatasetReport]:
    """Write ``report.md``, ``report.json``, ``report.png`` and ``contact-sheet.png`` of each dataset into a folder
    below `folder`.

    What has been written for the same index, settings and batch stands, and is not returned.

    Args:
        datasets: Each with its samples per optimizer step over all processes.
        folder: Made where it is not there.
    """
    heaviest = max(dataset.settings.probability for dataset, _ in datasets)
    return [
        write_report(dataset, folder / dataset.id, global_batch=global_batch, heaviest=heaviest)
        for dataset, global_batch in datasets
        if not _is_written(folder / dataset.id, _made_from(dataset, global_batch, heaviest))
    ]


def write_report(dataset: Dataset, folder: Path, *, global_batch: int, heaviest: float) -> DatasetReport:
    """Write the report of one dataset; figures come from the index, and only the contact sheet's images are read."""
    figures = statistics_of(dataset, global_batch=global_batch, heaviest=heaviest)
    samples = list(_samples(dataset))
    images = {"charts": draw_charts(figures)}
    if dataset.settings.has_images:
        images["contact sheet"] = contact_sheet(samples, title=f"{figures.id}: {len(samples)} samples")
    for name, image in images.items():
        save_image(image, folder / _file(name))
    text = markdown(figures, [sample.caption for sample in samples], list(images))
    write_text(folder / "report.md", redacted(text))
    made_from = _made_from(dataset, global_batch, heaviest)
    content = {"format": FORMAT, "made_from": made_from, **asdict(figures)}
    write_text(folder / "report.json", redacted(json.dumps(content, indent=1)) + "\n")
    return DatasetReport(dataset.id, folder, text, images)


def _file(name: str) -> str:
    return {"charts": "report.png"}.get(name, f"{name.replace(' ', '-')}.png")


def _made_from(dataset: Dataset, global_batch: int, heaviest: float) -> str:
    status = dataset.index.path.stat()
    settings = dataset.settings.model_dump_json(exclude={"backend"})
    counts = json.dumps(
        [dataset.counts.used, len(dataset.counts.quarantined), dataset.counts.captions, dataset.counts.cut]
    )
    parts = (FORMAT, status.st_size, status.st_mtime_ns, settings, counts, global_batch, heaviest)
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _is_written(folder: Path, made_from: str) -> bool:
    try:
        return json.loads((folder / "report.json").read_bytes())["made_from"] == made_from
    except (OSError, ValueError, KeyError, TypeError):
        return False


# -- samples ----------------------------------------------------------------------------------------------------------


def _samples(dataset: Dataset) -> Iterator[Sample]:
    """Yield some samples, the same ones for the same data."""
    count = min(SHEET_SAMPLES, len(dataset.rows))
    positions = np.sort(permute(np.arange(count), len(dataset.rows), derive_seed(0, "contact_sheet")))
    rows = dataset.rows[positions]
    if not dataset.settings.has_images:
        yield from (Sample(None, _caption(dataset, row)) for row in rows)
        return
    try:
        for row, opener in dataset.opened(rows):
            try:
                yield Sample(dataset.image(row, _thumbnail, opener), _caption(dataset, row))
            except (BrokenImage, OSError) as error:
                yield Sample(None, _caption(dataset, row), str(error))
    except OutOfReach as error:  # an image of the data is no reason to end a run whose caches are full
        yield Sample(None, "", f"the rest is out of reach: {error.reason}")


def _caption(dataset: Dataset, row: int) -> str:
    caption = dataset.index.caption(int(dataset.index.caption_offsets[row]))[: CAPTION_LETTERS + 1]
    return caption if len(caption) <= CAPTION_LETTERS else f"{caption[:CAPTION_LETTERS]}…"


def _thumbnail(image: Image) -> Image:
    from PIL import Image

    small = image.copy() if max(image.size) <= CELL else image
    scale = CELL / max(small.size)
    if scale >= 2:
        factor = int(scale)
        return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    size = max(1, round(small.width * min(scale, 1))), max(1, round(small.height * min(scale, 1)))
    return small.resize(size, Image.Resampling.LANCZOS)


def contact_sheet(samples: Sequence[Sample], *, title: str) -> Image:
    """Draw images with their first captions below them."""
    from PIL import Image, ImageDraw

    text, head = font(12), 44
    below = CAPTION_LINES * line_height(text) + 14
    columns = min(SHEET_COLUMNS, max(3, len(samples)))
    rows = max(1, -(-len(samples) // columns))
    pitch = CELL + 12
    size = (2 * MARGIN + columns * pitch - 12, head + rows * (CELL + below) + MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 12), shorten(title, font(18), size[0] - 2 * MARGIN), INK, font(18))
    for number, sample in enumerate(samples):
        left, top = MARGIN + number % columns * pitch, head + number // columns * (CELL + below)
        pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), EMPTY)
        if sample.image is not None:
            room = ((CELL - sample.image.width) // 2, (CELL - sample.image.height) // 2)
            sheet.paste(sample.image, (left + room[0], top + room[1]))
        for at, line in enumerate(wrap(sample.note, text, CELL - 12)[:10]):
            pen.text((left + 6, top + 6 + at * line_height(text)), line, FAINT, text)
        lines = wrap(printable(sample.caption), text, CELL)
        if len(lines) > CAPTION_LINES:
            lines = [*lines[: CAPTION_LINES - 1], shorten(f"{lines[CAPTION_LINES - 1]} …", text, CELL)]
        for at, line in enumerate(lines):
            pen.text((left, top + CELL + 4 + at * line_height(text)), line, INK, text)
    return sheet


# -- charts and tables ------------------------------------------------------------------------------------------------


def draw_charts(figures: DatasetStatistics) -> Image:
    """Sizes, shapes, buckets and lengths of captions."""
    noun, panels = f"{figures.noun}s", []
    if figures.sizes is not None:
        panels.append(_panel(figures.sizes, "sizes of the files", "megapixels", noun))
    if figures.aspects is not None:
        panels.append(_panel(figures.aspects, "shapes", "nearest width : height", noun))
    shown = figures.buckets[:MOST_BUCKETS]
    more = f", the largest {len(shown)} of {len(figures.buckets)}" if len(figures.buckets) > len(shown) else ""
    panels.append(
        Panel(
            f"buckets{more}", "width x height in pixels", [f"{each.width}x{each.height}" for each in shown],
            [each.full_batches * figures.global_batch for each in shown], f"{noun} per epoch",
            [each.carried_over for each in shown], ("in full batches", "carried over"),
        )
    )  # fmt: skip
    panels.append(_panel(figures.word_counts, "lengths of captions", "words", "captions"))
    full = sum(bucket.full_batches for bucket in figures.buckets)
    subtitle = f"{figures.location}    batches of {figures.global_batch}: {full:,} full ones in the first epoch"
    return draw(panels, title=figures.title, subtitle=printable(subtitle))


def _panel(histogram: Histogram, title: str, axis: str, counted: str) -> Panel:
    return Panel(title, axis, histogram.labels, histogram.counts, counted)


def markdown(figures: DatasetStatistics, captions: Sequence[str], images: Sequence[str]) -> str:
    """Return the page ``report.md``."""
    parts = [f"# {_cell(figures.title)}", _table(["", ""], _facts(figures))]
    parts += [f"![{name}]({_file(name)})" for name in images]
    spreads = {"width, pixels": figures.width, "height, pixels": figures.height, "megapixels": figures.megapixels,
               "captions each": figures.captions_each, "words per caption": figures.words}  # fmt: skip
    rows = [[name, *_numbers(spread)] for name, spread in spreads.items() if spread is not None]
    parts += ["## Sizes and captions", _table(["", "lowest", "median", "highest"], rows)]
    parts += ["## Buckets", _bucket_table(figures)]
    reasons = [[reason, f"{number:,}"] for reason, number in figures.left_out.items()]
    reasons += [["broken, quarantined", f"{len(figures.broken):,}"]] if figures.broken else []
    parts += ["## Left out", _table(["why", f"{figures.noun}s"], reasons) if reasons else "Nothing."]
    if figures.broken:
        parts += ["## Broken", _listed(named_with_reasons(figures.broken), "`report.json`")]
    if figures.without_caption:
        parts += ["## Without a caption", _listed(figures.without_caption, "the data")]
    parts += ["## Some captions", "\n".join(f"- {_cell(printable(caption))}" for caption in captions if caption)]
    return "\n\n".join(parts) + "\n"


def _facts(figures: DatasetStatistics) -> list[list[str]]:
    noun, full = f"{figures.noun}s", sum(bucket.full_batches for bucket in figures.buckets)
    carried = sum(bucket.carried_over for bucket in figures.buckets)
    facts = {
        "where": _cell(printable(figures.location)),
        f"{noun} found": f"{figures.found:,}",
        f"{noun} used": f"{figures.used:,}",
        "left out": f"{sum(figures.left_out.values()):,}",
        "broken": f"{len(figures.broken):,}",
        "size of the used files": f"{figures.file_bytes / 1e6:,.3g} MB" if figures.file_bytes else "",
        "scaled up to their bucket": f"{figures.enlarged:.1%}" if figures.width is not None else "",
        "captions": f"{figures.captions:,}",
        "different captions": f"{figures.different_captions:,}" if figures.different_captions else "",
        "captions cut off": _cell(figures.cut),
        "full batches in the first epoch": f"{full:,} of {figures.global_batch}",
        f"{noun} carried over to the next": f"{carried:,.6g}",
    }
    return [[name, value] for name, value in facts.items() if value]


def _bucket_table(figures: DatasetStatistics) -> str:
    shown = figures.buckets[:MOST_BUCKETS]
    rows = [
        [f"{each.width}x{each.height}", f"{each.samples:,}", f"{each.per_epoch:,.6g}", f"{each.full_batches:,}",
         f"{each.carried_over:,.6g}"]
        for each in shown
    ]  # fmt: skip
    head = ["bucket", f"{figures.noun}s", "per epoch", "full batches", "carried over"]
    rest = len(figures.buckets) - len(shown)
    note = "What does not fill a batch waits for the next epoch's samples of its bucket: nothing is dropped."
    return _table(head, rows) + (f"\n\n{rest:,} smaller ones are in `report.json`." if rest else "") + f"\n\n{note}"


def _numbers(spread: Spread) -> list[str]:
    values = (spread.lowest, spread.median, spread.highest)
    return [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values]


def _listed(lines: Sequence[str], where: str) -> str:
    rest = f"\n\nThe rest is in {where}." if len(lines) > NAMED else ""
    return "\n".join(f"- {_cell(line)}" for line in lines[:NAMED]) + rest


def _cell(text: str) -> str:
    """Escape a text for Markdown."""
    for letter in "\\`*_|<[":
        text = text.replace(letter, f"\\{letter}")
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
