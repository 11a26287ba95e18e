"""Publishers of a run: checked at its start, used at its end; what fails is said and ends nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, described, is_failure
from ..plugin_api.publisher import PublishSetting
from ..utils.packages import missing_packages

if TYPE_CHECKING:
    from ..plugin_api.publisher import Publisher
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration

logger = logging.getLogger(__name__)


class Publishers:
    """The publishers that a run asks for.

    Args:
        publishers: By name.
    """

    def __init__(self, publishers: Mapping[str, Publisher]) -> None:
        self._publishers = dict(publishers)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are still in use."""
        return tuple(self._publishers)

    def leave_out(self) -> list[str]:
        """Leave out those that cannot work, now rather than after hours; return a warning for each problem."""
        warnings = []
        for name, publisher in list(self._publishers.items()):
            problems = publisher.problems()
            for problem in problems:
                warnings.append(f"{name}: {problem}; the run goes on, and the student stays in the output folder")
            if problems:
                del self._publishers[name]
        return warnings

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
                logger.info(f"{name}: published to {addresses[-1]}")
            except BaseException as error:  # the student is safe on disk; no service's failure may end a finished run
                if not is_failure(error):
                    raise
                logger.warning(f"{name}: publishing failed: {described(error)}; it lies in {student}")
        return addresses


def build_publishers(registry: Registry, configuration: Configuration) -> tuple[Publishers, list[str]]:
    """Return the publishers that the run asks for and that can work, and warnings of those that are left out."""
    publishers, warnings, setting = {}, [], publish_setting(registry, configuration)
    for name, publisher, config in _asked_for(registry, configuration):
        missing = missing_packages(publisher.packages)
        if missing:
            warnings.append(f"{name}: {missing}; the student will not be published")
        else:
            publishers[name] = publisher(config, setting)
    built = Publishers(publishers)
    return built, warnings + built.leave_out()


def publishers_named(registry: Registry, configuration: Configuration, names: Sequence[str]) -> Publishers:
    """Return the publishers of these names, or those that the run asks for where there is no name.

    Raises:
        UserError: There is none of a name, its package is missing, it cannot work, or nothing is asked for.
    """
    publishers, setting = {}, publish_setting(registry, configuration)
    for name, publisher, config in _asked_for(registry, configuration, names):
        missing = missing_packages(publisher.packages)
        if missing:
            raise UserError(f"{name}: {missing}", "install it, or leave it out")
        publishers[name] = publisher(config, setting)
    if not publishers:
        known = ", ".join(registry.names("publisher"))
        raise UserError("the run publishes nowhere", f"name where to: --to NAME (registered: {known})")
    return Publishers(publishers)


def _asked_for(
    registry: Registry, configuration: Configuration, names: Sequence[str] = ()
) -> Iterator[tuple[str, type[Publisher], Any]]:
    """Yield name, class and settings of each publisher of `names`, or of those that the run asks for."""
    wanted = {registry.get("publisher", name).name for name in names}
    for name in registry.names("publisher"):
        if wanted and name not in wanted:
            continue
        # a publisher may take keys of the run over (hub_model_id): so it is asked as if the run named it
        run = configuration.run.model_copy(update={"publish_to": (name,)}) if wanted else configuration.run
        publisher = registry.get("publisher", name)
        config = publisher.from_run(run, configuration.publishers.get(name))
        if config is not None:
            yield name, publisher, config


def publish_setting(registry: Registry, configuration: Configuration) -> PublishSetting:
    """Return what publishers may know of the run."""
    from .builders import build_family

    run = configuration.run
    return PublishSetting(
        run_name=run.tracker_run_name or run.output_dir.name,
        model_type=run.model_type,
        family=registry.get("family", run.model_family),
        load_family=partial(build_family, configuration, registry),
    )
