"""Publishers of a run: checked at its start, used at its end; what fails is said and ends nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..plugin_api.publisher import PublishSetting
from ..utils.packages import missing_packages

if TYPE_CHECKING:
    from ..plugin_api.publisher import Publisher
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration

Say = Callable[[str], None]


class Publishers:
    """The publishers that a run asks for.

    Args:
        publishers: By name.
        say: Where warnings go, a line each.
    """

    def __init__(self, publishers: Mapping[str, Publisher], say: Say) -> None:
        self._publishers, self._say = dict(publishers), say

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are still in use."""
        return tuple(self._publishers)

    def check(self) -> None:
        """Warn now of what would keep each from working, rather than after hours; those are left out."""
        for name, publisher in list(self._publishers.items()):
            problems = publisher.problems()
            for problem in problems:
                self._say(f"warning: {name}: {problem}; the run goes on, and the student stays in the output folder")
            if problems:
                del self._publishers[name]

    def require(self) -> None:
        """Raise UserError for what would keep any of them from working."""
        problems = [
            f"{name}: {problem}" for name, publisher in self._publishers.items() for problem in publisher.problems()
        ]
        if problems:
            raise UserError("; ".join(problems), "nothing was published")

    def publish(self, student: Path) -> list[str]:
        """Publish the finished student; returns where it went."""
        addresses = []
        for name, publisher in self._publishers.items():
            try:
                addresses.append(publisher.publish(student))
                self._say(f"{name}: published to {addresses[-1]}")
            except Exception as error:  # the student is safe on disk; no service's failure may end a finished run
                self._say(f"warning: {name}: publishing failed: {type(error).__name__}: {error}; it lies in {student}")
        return addresses


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
            publishers[name] = publisher(config, publish_setting(registry, configuration))
    return Publishers(publishers, say)


def publishers_named(registry: Registry, configuration: Configuration, names: Sequence[str], say: Say) -> Publishers:
    """The publishers of these names, or those that the run asks for where there is no name.

    Raises:
        UserError: There is none of a name, its package is missing, or nothing is asked for.
    """
    wanted = {registry.get("publisher", name).name for name in names}
    publishers = {}
    for name in registry.names("publisher"):
        publisher, given = registry.get("publisher", name), configuration.publishers.get(name)
        # a publisher may take keys of the run over (hub_model_id): so it is asked as if the run named it
        run = configuration.run.model_copy(update={"publish_to": (name,)}) if name in wanted else configuration.run
        config = publisher.from_run(run, given) if name in wanted or not wanted else None
        if config is None:
            continue
        missing = missing_packages(publisher.packages)
        if missing:
            raise UserError(f"{name}: {missing}", "install it, or leave it out")
        publishers[name] = publisher(config, publish_setting(registry, configuration))
    if not publishers:
        known = ", ".join(registry.names("publisher"))
        raise UserError("the run publishes nowhere", f"name where to: --to NAME (registered: {known})")
    return Publishers(publishers, say)


def publish_setting(registry: Registry, configuration: Configuration) -> PublishSetting:
    """What publishers may know of the run."""
    from .builders import build_family

    run = configuration.run
    return PublishSetting(
        run_name=run.tracker_run_name or run.output_dir.name,
        model_type=run.model_type,
        family=registry.get("family", run.model_family),
        load_family=partial(build_family, configuration, registry),
    )
