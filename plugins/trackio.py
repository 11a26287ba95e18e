"""Trackio: a SQLite file under ``output_dir/trackio``, shown by a local dashboard."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.tracker import RunInfo, Tracker

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "trackio"
ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Variables of Trackio that send the run to a Space or a server."""


class Trackio(Tracker):
    """One Trackio run, found again by its name when the run is resumed.

    Trackio has one folder per process, which it chooses on import: the first run's, unless TRACKIO_DIR or ``folder``
    name one for all.
    """

    name: ClassVar[str] = "trackio"
    packages: ClassVar[Mapping[str, str]] = {"trackio": "trackio>=0.27"}

    class Config(BaseModel):
        """Settings of the Trackio run."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        folder: Path | None = None
        """Folder to write to; absent: TRACKIO_DIR, else `trackio` in the output folder."""
        system_metrics: bool = False
        """Whether the load of processor and GPU is recorded as well."""

    _run: Any = None
    _notices: Sequence[str] = ()
    _last_step: int = 0

    def start(self, run: RunInfo) -> None:
        """Open the run, or continue the newest one of its name."""
        wanted = Path(self.config.folder or os.environ.get("TRACKIO_DIR") or run.output_dir / FOLDER).absolute()
        wanted.mkdir(parents=True, exist_ok=True)
        trackio = _library(wanted)
        automatic = None if self.config.system_metrics else False
        with redirect_stdout(io.StringIO()), _away_from_the_hub():
            self._run = trackio.init(
                project=run.project,
                name=run.name,
                config={**run.config, "hparams": dict(run.hparams)},
                resume="allow" if run.resumed_step else "never",
                auto_log_cpu=automatic,
                auto_log_gpu=automatic,
                embed=False,
            )
        folder = Path(trackio.utils.TRACKIO_DIR)
        self._last_step = run.resumed_step
        self._notices = [f"watch with: TRACKIO_DIR={folder} trackio show --project {run.project}"]
        if folder != wanted:
            self._notices = [f"writes into {folder}, the folder of this process' first run", *self._notices]

    def notices(self) -> list[str]:
        """Return how to look at the run."""
        return list(self._notices)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write all metrics of the step in one row."""
        self._last_step = step
        self._run.log(dict(metrics), step=step)

    def images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        """Write one image per caption, under ``name/caption``."""
        trackio = importlib.import_module("trackio")
        for caption, image in images.items():
            self._run.log({f"{name}/{caption}": trackio.Image(image, caption=caption)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Write Markdown."""
        self._run.log({name: importlib.import_module("trackio").Markdown(text)}, step=step)

    def finish(self, scores: Mapping[str, float] | None = None) -> None:
        """Write the scores at the last step and wait until all is written."""
        if scores:
            self._run.log(dict(scores), step=self._last_step)
        with redirect_stdout(io.StringIO()):
            importlib.import_module("trackio").finish()


@contextmanager
def _away_from_the_hub() -> Iterator[None]:
    """Send no request inside the block: Trackio asks the hub whose token this is, even for a local run."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not any(os.environ.get(name) for name in ELSEWHERE)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _library(folder: Path) -> Any:
    """Import the package of this module's own name, which takes its folder from the environment on import."""
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    try:
        return importlib.import_module("trackio")
    finally:
        if before is None:
            del os.environ["TRACKIO_DIR"]
        else:
            os.environ["TRACKIO_DIR"] = before


@hookimpl
def register_trackers() -> Sequence[type[Tracker]]:
    """Return the tracker of this file."""
    return [Trackio]
