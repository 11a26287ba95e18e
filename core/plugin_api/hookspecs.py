"""Every hook that a plugin can implement. Registration hooks return classes; observation hooks watch a run.

Hooks run on every rank. A plugin is a module (or object) whose functions carry ``@distill.hookimpl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .backend import DataBackend
    from .evaluator import Evaluator
    from .family import ModelFamily
    from .method import Method
    from .optimizer import OptimizerPlugin
    from .publisher import Publisher
    from .quantizer import Quantizer
    from .run_state import RunState
    from .tracker import Tracker

PROJECT = "distill"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_methods() -> Sequence[type[Method]]:  # type: ignore[empty-body]
    """Return the distillation methods that this plugin adds."""


@hookspec
def register_families() -> Sequence[type[ModelFamily]]:  # type: ignore[empty-body]
    """Return the model families that this plugin adds."""


@hookspec
def register_data_backends() -> Sequence[type[DataBackend]]:  # type: ignore[empty-body]
    """Return the data backends that this plugin adds."""


@hookspec
def register_trackers() -> Sequence[type[Tracker]]:  # type: ignore[empty-body]
    """Return the trackers that this plugin adds."""


@hookspec
def register_optimizers() -> Sequence[type[OptimizerPlugin]]:  # type: ignore[empty-body]
    """Return the optimizers that this plugin adds."""


@hookspec
def register_quantizers() -> Sequence[type[Quantizer]]:  # type: ignore[empty-body]
    """Return the quantizers of the frozen base and the text encoders that this plugin adds."""


@hookspec
def register_evaluators() -> Sequence[type[Evaluator]]:  # type: ignore[empty-body]
    """Return the evaluators that this plugin adds."""


@hookspec
def register_publishers() -> Sequence[type[Publisher]]:  # type: ignore[empty-body]
    """Return the publishers that this plugin adds."""


@hookspec
def register_recipes() -> Sequence[Path]:  # type: ignore[empty-body]
    """Return files of published settings that this plugin adds, each named by its file: ``my-recipe.yaml``."""


@hookspec
def on_run_start(state: RunState) -> None:
    """Called when everything is loaded and the first step is about to run."""


@hookspec
def on_step_end(state: RunState, step: int) -> None:
    """Called after optimizer step `step`."""


@hookspec
def on_log(state: RunState, metrics: Mapping[str, float], step: int) -> None:
    """Called when the metrics of `step` were read from the device and go to the trackers."""


@hookspec
def on_validation_end(state: RunState, folder: Path, step: int) -> None:
    """Called when the validation images of `step` lie in `folder`, with ``scores.json`` where the run scores them."""


@hookspec
def on_checkpoint_saved(state: RunState, folder: Path, step: int) -> None:
    """Called when the checkpoint of `step` is complete in `folder`; `state` may be some steps further by then."""


@hookspec
def on_exception(state: RunState, error: BaseException) -> None:
    """Called when the run ends with `error`."""


@hookspec
def on_run_end(state: RunState) -> None:
    """Called when the run has ended well and the student is exported."""
