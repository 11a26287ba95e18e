"""The page itself: what was found, put into the template, with everything escaped and nothing loaded."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..drawing.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, short
from ..runs.run_files import RunFiles
from ..utils.files import write_text
from ..utils.redaction import redacted
from .comparison import Comparison, compare
from .run_contents import RunContents, find

if TYPE_CHECKING:
    from jinja2 import Environment

FILE = "report.html"
ASSETS = Path(__file__).parent / "assets"
FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, finished or not; returns it.

    Raises:
        UserError: It is no folder of a run, or a file in it is damaged.
    """
    write_text(folder / FILE, redacted(render(find(folder))))
    return folder / FILE


def write_comparison(one: Path, two: Path) -> Path:
    """Write the page of two runs side by side into the folder of the first, under the name of the second; returns it.

    Raises:
        UserError: One is no folder of a run or has no validation, both are the same, or a file is damaged.
    """
    found = compare(one, two)
    name = f"report-with-{found.labels[1].replace('/', '-')}.html"
    with RunFiles(one).writing(name):
        write_text(one / name, redacted(render(found)))
    return one / name


def render(found: RunContents | Comparison) -> str:
    """The page; it forbids itself to load or run anything but its own style and script."""
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _templates().get_template("report.html" if isinstance(found, RunContents) else "comparison.html")
    return template.render(found=found, frame=FRAME, style=style, script=script, policy=policy)


@cache
def _templates() -> Environment:
    """Return the environment of the page's templates, each of which is compiled once in a process."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "plotted": _plotted}
    return environment


def _plotted(curve: Curve) -> list[dict[str, object]]:
    """Return the lines of a chart as its script reads them."""
    return [{"label": line.label, "number": line.number, "points": line.points} for line in curve.lines]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
