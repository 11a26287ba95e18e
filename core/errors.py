"""Errors that reach people. Each carries the exit code that the command line ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DistillError(Exception):
    """Something failed while running (exit code 1)."""

    exit_code = 1


class UserError(DistillError):
    """The configuration, the arguments or the data are unusable as given (exit code 2).

    Args:
        message: What is wrong, in a sentence that names the thing.
        remedy: How to mend it, in a sentence; printed on its own line.
    """

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n  {remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy


class UnreachableError(UserError):
    """A file of the hub is needed that is not in its cache, and there is no network."""


class BadValue(Exception):
    """A key of a data-file entry whose value cannot be used as it is.

    Args:
        key: The entry's key at fault.
        value: Its value.
        problem: What is wrong with it, with the line where there is one.
        remedy: How to mend it.
    """

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{key} = {value!r}: {problem}")
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong in a configuration."""

    file: str
    """The file (or ``command line``) that the value comes from."""
    key: str
    """Dotted path of the key, as ``distillation_config.lcm.w_min`` or ``data.my-set.resolution``."""
    value: object
    """The value as given."""
    problem: str
    """What is wrong with it, and what is accepted."""
    remedy: str
    """How to mend it: the nearest known key, an example, a command."""

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 100 else f"{shown[:38]}...{shown[-59:]}"  # a path says most at its end
        return f"{self.file}: {self.key} = {shown}: {self.problem}\n    remedy: {self.remedy}"


class ConfigError(UserError):
    """All findings of a configuration at once."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        count = len(self.findings)
        head = f"the configuration has {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([head, *(f"  {finding}" for finding in self.findings)]))


class OutOfReach(DistillError):
    """A place where data or caches live does not answer, after all retries: the run ends resumable (exit code 1).

    Args:
        place: What was being read or written, as people know it.
        reason: What the last attempt said.
    """

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(
            f"{place} cannot be reached: {reason}\n"
            "  Nothing is lost: when it answers again, start the run again with resume_from_checkpoint=latest."
        )
        self.place, self.reason = place, reason


class PluginError(DistillError):
    """A plugin failed; the message names the plugin and the hook."""


class Interrupted(DistillError):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has written a checkpoint."""

    exit_code = 130
