"""Errors that reach people. Each carries the exit code that the command line ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DistillError(Exception):
    """Something failed while running (exit code 1)."""

    exit_code = 1


def described(error: BaseException) -> str:
    """Return the kind of an error and its message, whatever becomes of asking it for that."""
    try:
        message = str(error)
    except BaseException as second:  # somebody else's __str__: the error it hides is the one to be told
        message = f"(its message cannot be read: __str__ raised {type(second).__name__})"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_failure(error: BaseException) -> bool:
    """Return whether an exception is a failure of the code that raised it, ``SystemExit`` and ``GeneratorExit``
    included, rather than somebody's wish to stop.
    """
    return not isinstance(error, KeyboardInterrupt | Interrupted)


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
        shown = shortened(repr(self.value), 100)
        key, problem, remedy = (shortened(printable(text), 1000) for text in (self.key, self.problem, self.remedy))
        return f"{printable(self.file)}: {key} = {shown}: {problem}\n    remedy: {remedy}"


def shortened(text: str, width: int) -> str:
    """Return a text in at most `width` characters: its beginning and its end, since a path says most at its end."""
    end = 3 * width // 5 - 1
    return text if len(text) <= width else f"{text[: width - end - 3]}...{text[-end:]}"


def printable(text: str) -> str:
    """Return a text with its control characters and lone surrogates escaped: terminals obey the ones, and no stream
    takes the others.
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


SHOWN_FINDINGS = 100
"""Findings that a message writes out: what is wrong beyond them is counted."""


class ConfigError(UserError):
    """All findings of a configuration at once."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        count = len(self.findings)
        head = f"the configuration has {count} problem{'s' if count != 1 else ''}:"
        shown = [f"  {finding}" for finding in self.findings[:SHOWN_FINDINGS]]
        more = [f"  ... and {count - SHOWN_FINDINGS:,} more"] if count > SHOWN_FINDINGS else []
        super().__init__("\n".join([head, *shown, *more]))


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
