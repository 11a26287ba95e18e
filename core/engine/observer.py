"""What a run does around the training's steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext


class TrainingObserver:
    """Told of each step by the trainer; does nothing by itself."""

    def on_step(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Note that `step` was taken, with its metrics where they were read from the device."""

    def between_steps(self) -> None:
        """Do after a step what need not come before it; its time is not the training's."""

    def validate(self, step: int) -> object:
        """Make validation images with the weights of `step`."""

    def on_saving(self, step: int) -> None:
        """Note that the checkpoint of `step` is about to be written."""

    def on_saved(self, step: int) -> None:
        """Note that the checkpoint of `step` is complete."""

    def pause(self) -> AbstractContextManager[None]:
        """Return a context whose time does not count in the estimate of the time that is left."""
        return nullcontext()
