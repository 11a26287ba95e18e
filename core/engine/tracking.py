"""All trackers of a run as one object: a tracker that fails is switched off, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import described, is_failure
from ..utils.packages import missing_packages
from ..utils.redaction import redacted

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..plugin_api.tracker import RunInfo, Tracker
    from ..registry.registry import Registry

logger = logging.getLogger(__name__)


class Trackers:
    """The run's trackers.

    Args:
        trackers: (name, tracker) pairs, in the order of ``report_to``.
    """

    def __init__(self, trackers: Sequence[tuple[str, Tracker]]) -> None:
        self._trackers = dict(trackers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trackers that are still on."""
        return tuple(self._trackers)

    def start(self, run: RunInfo) -> None:
        """Open the run in each tracker and print its notices."""
        self._each("start", run)
        for name, notices in self._each("notices").items():
            for notice in notices:
                logger.info(f"{name}: {notice}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the scalars of a step."""
        self._each("log", metrics, step)

    def images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        """Log images by caption."""
        self._each("images", name, images, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Log Markdown text."""
        self._each("text", name, redacted(text), step)

    def finish(self, scores: Mapping[str, float] | None = None) -> None:
        """Close each tracker; `scores` are the run's final scores. Nothing is tracked afterwards."""
        self._each("finish", scores)
        self._trackers.clear()

    def _each(self, call: str, *args: Any) -> dict[str, Any]:
        """Call each tracker and return the results, by tracker."""
        returned = {}
        for name, tracker in list(self._trackers.items()):
            try:
                returned[name] = getattr(tracker, call)(*args)
            except BaseException as error:  # somebody else's service must not end hours of training; it is said, once
                if not is_failure(error):
                    raise
                del self._trackers[name]
                logger.warning(switched_off(name, f"in {call}()", error))
        return returned


def switched_off(name: str, where: str, error: BaseException) -> str:
    """Return the warning of a tracker that failed."""
    return f"tracker {name} failed {where} and is switched off, the run goes on: {described(error)}"


def build_trackers(registry: Registry, names: Sequence[str], configs: Mapping[str, Any]) -> tuple[Trackers, list[str]]:
    """Return the named trackers, and a warning for each that has to be left out.

    Args:
        registry: Registry that resolves the names.
        names: ``report_to``.
        configs: Validated settings by tracker name; the defaults where there are none.
    """
    trackers, warnings = [], []
    for name in names:
        tracker = registry.get("tracker", name)
        problem = missing_packages(tracker.packages)
        if problem:
            warnings.append(f"tracker {name} is left out, the run goes on: {problem}")
            continue
        try:
            trackers.append((name, tracker(configs.get(name) or tracker.Config())))
        except BaseException as error:  # as little as in its calls later
            if not is_failure(error):
                raise
            warnings.append(switched_off(name, "when it was made", error))
    return Trackers(trackers), warnings
