"""What a run said, and when: ``run.log`` in its folder, a line for each, kept over resumes."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from ..utils.files import append_whole
from ..utils.redaction import redacted

logger = logging.getLogger(__name__)
FILE = "run.log"
BEGINS, ENDS_WELL, ENDS = "run begins", "run ends well", "run ends: "
STAMP = "%Y-%m-%dT%H:%M:%SZ"
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (.*)", re.DOTALL)


class RunLog:
    """Lines with their time; what is said before the run's folder is open waits for it.

    A line that the system does not take (a full disk) is printed all the same, and written when it can be.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._waiting: list[str] = []
        self._refused = False

    def open(self, folder: Path) -> None:
        """Append to the log of the run in `folder`, beginning with what waits."""
        self._file = (folder / FILE).open("ab", buffering=0)
        self._waiting.insert(0, _stamped(BEGINS))
        self._write()

    def note(self, line: str) -> None:
        """Note a line; its further lines are indented."""
        self._waiting.append(_stamped(line))
        self._write()

    def close(self) -> None:
        """Close the file; what is noted afterwards waits."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            append_whole(self._file, "".join(self._waiting).encode("utf-8", "backslashreplace"))
            self._waiting, self._refused = [], False
        except OSError as error:
            if not self._refused:
                self._refused = True  # before the next line comes here
                logger.warning(f"{FILE} cannot be written, and goes on when it can: {error.strerror}")


def _stamped(line: str) -> str:
    indented = redacted(line).rstrip("\n").replace("\n", "\n    ")
    return f"{datetime.now(UTC).strftime(STAMP)} {indented}\n"


@dataclass
class Session:
    """From one start of the run to its end, or to where it was killed.

    Attributes:
        lines: (time, what was said), without beginning and end.
        outcome: None where no end stands; the empty text for a good one; else what it failed with.
    """

    begun: datetime
    last: datetime
    lines: list[tuple[datetime, str]] = field(default_factory=list)
    outcome: str | None = None

    @property
    def seconds(self) -> float:
        """From the first line to the last."""
        return (self.last - self.begun).total_seconds()


def read_log(folder: Path) -> list[Session]:
    """The sessions of the run in `folder`; none where there is no log."""
    if not (folder / FILE).is_file():
        return []
    text = (folder / FILE).read_text(encoding="utf-8", errors="replace")
    sessions: list[Session] = []
    for entry in re.split(r"\n(?!    )", text.rstrip("\n")):
        found = _LINE.fullmatch(entry)
        if found:
            _add(sessions, datetime.strptime(found[1], STAMP).replace(tzinfo=UTC), found[2].replace("\n    ", "\n"))
    return sessions


def _add(sessions: list[Session], time: datetime, line: str) -> None:
    if line == BEGINS or not sessions:
        sessions.append(Session(time, time))
    session = sessions[-1]
    session.last = time
    if line == ENDS_WELL:
        session.outcome = ""
    elif line.startswith(ENDS):
        session.outcome = line.removeprefix(ENDS)
    elif line != BEGINS:
        session.lines.append((time, line))
