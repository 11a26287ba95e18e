"""The suite run on a whole plugin: a file, a folder with a project, a module or an installed package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import is_failure
from .checks import Check, ConformanceError, NotApplicable, said

Result = Literal["ok", "failed", "not applicable"]


@dataclass(frozen=True)
class Outcome:
    """How one check ended."""

    check: Check
    result: Result
    reason: str = ""

    def __str__(self) -> str:
        return ": ".join([self.result, str(self.check), *([" ".join(self.reason.split())] if self.reason else [])])


@dataclass
class ConformanceReport:
    """How all checks of a plugin ended."""

    plugin: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        """The checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.result == "failed"]

    def count(self, result: Result) -> int:
        """Return the number of checks with this result."""
        return sum(outcome.result == result for outcome in self.outcomes)

    def failures(self) -> list[str]:
        """Return a text for each reason that checks failed for, with the checks; a reason of several stands once."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.failed:
            found.setdefault(outcome.reason, []).append(outcome)
        return [_one_reason(outcomes) for outcomes in found.values()]

    def __str__(self) -> str:
        words = ("ok", "failed", "not applicable")
        return f"{self.plugin}: " + ", ".join(f"{self.count(word)} {word}" for word in words)  # type: ignore[arg-type]


def _one_reason(outcomes: Sequence[Outcome]) -> str:
    if len(outcomes) == 1:
        return str(outcomes[0])
    reason = " ".join(outcomes[0].reason.split())
    names: dict[str, list[str]] = {}
    for outcome in outcomes:
        names.setdefault(outcome.check.subject, []).append(outcome.check.name)
    where = [f"  {subject}: {', '.join(each)}" for subject, each in names.items()]
    return "\n".join([f"failed: {len(outcomes)} checks, all for this reason: {reason}", *where])


def outcome_of(check: Check) -> Outcome:
    """Run a check and return its outcome, whatever it raises."""
    try:
        check.run()
    except NotApplicable as reason:
        return Outcome(check, "not applicable", str(reason))
    except ConformanceError as reason:
        return Outcome(check, "failed", str(reason))
    except BaseException as error:  # somebody else's code may raise anything: the other checks are still worth running
        if not is_failure(error):
            raise
        return Outcome(check, "failed", said(error))
    return Outcome(check, "ok")


def check_plugin(
    argument: str, *, only: str = "", tell: Callable[[Outcome], None] = lambda outcome: None
) -> ConformanceReport:
    """Load a plugin and run every check of every class that it registers.

    Args:
        argument: A plugin file, a folder with a pyproject.toml that names its entry points, the name of a module, or
            of an installed package.
        only: Text that the checks to run have in their names, as ``[flow]`` or ``tracker mine``; empty runs all.
        tell: Called with each outcome as soon as it is known.

    Raises:
        UserError: There is nothing of that name, or it cannot be imported.
    """
    from .loading import checks_of_source, sources_of

    report = ConformanceReport(argument)
    checks = [check for source in sources_of(argument) for check in checks_of_source(source) if only in str(check)]
    for check in checks:
        report.outcomes.append(outcome_of(check))
        tell(report.outcomes[-1])
    return report
