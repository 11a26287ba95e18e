"""TensorBoard: scalars, images, text and hyperparameters under ``output_dir/tensorboard``."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.tracker import RunInfo, Tracker

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """Writes event files; a resumed run hides what an interrupted one wrote after its checkpoint."""

    name: ClassVar[str] = "tensorboard"
    packages: ClassVar[Mapping[str, str]] = {"tensorboard": "tensorboard>=2.18"}

    class Config(BaseModel):
        """Settings of the event files."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        flush_seconds: float = Field(default=20.0, gt=0)
        """Seconds after which written events reach the disk."""

    _writer: Any = None
    _session_end: Any = None
    _last_step: int = 0

    def start(self, run: RunInfo) -> None:
        """Open an event file, and write the hyperparameters at once, so that an interrupted run has them too."""
        from torch.utils.tensorboard.writer import SummaryWriter

        _leave_to_the_next_call()
        self._writer = SummaryWriter(
            str(run.output_dir / FOLDER),
            purge_step=run.resumed_step + 1 if run.resumed_step else None,
            flush_secs=max(1, round(self.config.flush_seconds)),
        )
        self._hparams(run)
        self._writer.flush()

    def _hparams(self, run: RunInfo) -> None:
        # SummaryWriter.add_hparams would open a second run beside this one; its scalars would not stand with the rest
        from torch.utils.tensorboard.summary import hparams

        allowed = {key: value for key, value in run.hparams.items() if isinstance(value, bool | int | float | str)}
        _, session_start, self._session_end = hparams(allowed, {})
        self._writer._get_file_writer().add_summary(session_start)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one scalar per metric."""
        self._last_step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        """Write one image per caption, under ``name/caption``."""
        import numpy as np

        for caption, image in images.items():
            pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"{name}/{caption}", pixels, step, dataformats="HWC")
        self._writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """Write Markdown."""
        self._writer.add_text(name, text, step)

    def finish(self, scores: Mapping[str, float] | None = None) -> None:
        """Write the final scores, end the session and close the file."""
        for name, value in (scores or {}).items():
            self._writer.add_scalar(name, value, self._last_step)
        self._writer._get_file_writer().add_summary(self._session_end)
        self._writer.close()


def _leave_to_the_next_call() -> None:
    """Print no traceback of a failure in tensorboard's own thread: the next call raises it, and the run says it."""
    printed = threading.excepthook
    if printed.__module__ == __name__:
        return

    def left_to_the_next_call(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            printed(failure)

    threading.excepthook = left_to_the_next_call


@hookimpl
def register_trackers() -> Sequence[type[Tracker]]:
    """Return the tracker of this file."""
    return [TensorBoard]
