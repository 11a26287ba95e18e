"""Publishers of a run: checked at its start, used at its end; what fails is said and ends nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .tracking import missing_packages

if TYPE_CHECKING:
    from .config import Configuration
    from .plugins import Registry
    from .publisher import Publisher

Say = Callable[[str], None]


class Publishers:
    """The publishers that a run asks for.

    Args:
        publishers: By name.
        say: Where warnings go, a line each.
    """

    def __init__(self, publishers: Mapping[str, Publisher], say: Say) -> None:
        self._publishers, self._say = dict(publishers), say

    def check(self) -> None:
        """Warn now of what would keep each from working, rather than after hours; those are left out."""
        for name, publisher in list(self._publishers.items()):
            problems = publisher.problems()
            for problem in problems:
                self._say(f"warning: {name}: {problem}; the run goes on, and the student stays in the output folder")
            if problems:
                del self._publishers[name]

    def publish(self, student: Path) -> list[str]:
        """Publish the finished student; returns where it went."""
        places = []
        for name, publisher in self._publishers.items():
            try:
                places.append(publisher.publish(student))
                self._say(f"{name}: published to {places[-1]}")
            except Exception as error:  # the student is safe on disk; no service's failure may end a finished run
                self._say(f"warning: {name}: publishing failed: {type(error).__name__}: {error}; it lies in {student}")
        return places


def build_publishers(registry: Registry, configuration: Configuration, say: Say) -> Publishers:
    """The publishers that the run asks for; one whose package is missing is left out with its install line."""
    publishers = {}
    for name in registry.names("publisher"):
        publisher = registry.get("publisher", name)
        config = publisher.from_run(configuration.run, configuration.publishers.get(name))
        if config is None:
            continue
        missing = missing_packages(publisher.packages)
        if missing:
            say(f"warning: {name}: {missing}; the student will not be published")
        else:
            publishers[name] = publisher(config)
    return Publishers(publishers, say)
