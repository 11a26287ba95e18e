"""A lock on a folder that dies with its process, on drives that several machines share as well.

Two files lie in the folder. The first is locked by the operating system (flock, or what Windows has), which frees it
when the process ends in whatever way. The second says who holds the lock, and is touched every few seconds: that is
what a machine goes by whose file system does not carry locks from the others.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

BEAT_SECONDS = 15.0
"""Seconds between two signs of life."""
SILENT_SECONDS = 90.0
"""Seconds without a sign of life after which a holder on another machine counts as gone."""
CLOCK_SECONDS = 5.0
"""Seconds by which the system's account of when a process started may move as its clock is set."""
MEET_SECONDS = 1.0
"""Seconds after which two processes that begin at once see each other where there are no locks."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems that have no locks."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: Name of its machine.
        pid: Its process id there.
        begun: When it took the lock, in UTC.
        machine: Identifies the start of the machine and the group of processes among which the id is unique.
        started: When the process started, as the machine counts; tells it from a later one of the same id.
        token: Differs with every lock taken.
    """

    host: str
    pid: int
    begun: str
    machine: str
    started: float
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, begun {self.begun}"

    @property
    def is_here(self) -> bool:
        """Return True if its process id has a meaning on this machine."""
        return self.machine == _machine()

    @property
    def is_running(self) -> bool:
        """Return True if that process is running on this machine."""
        started = _started(self.pid)
        return started is not None and abs(started - self.started) < CLOCK_SECONDS


class FolderInUse(Exception):
    """Another process holds the lock.

    Args:
        holder: That process; None where it has not said yet who it is.
        silent_seconds: Seconds since its last sign of life where that alone tells that it is there.
    """

    def __init__(self, holder: Holder | None, silent_seconds: float | None = None) -> None:
        super().__init__(f"in use by {holder or 'a process that has just begun'}")
        self.holder, self.silent_seconds = holder, silent_seconds


class FolderLock:
    """The lock on one folder.

    Args:
        folder: An existing folder.
        name: Of the lock; begins the names of its files.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        self.folder = folder
        self.file, self.holder_file = folder / f".{name}.lock", folder / f".{name}.holder.json"
        self._lock = FileLock(str(self.file), timeout=0, thread_local=False)
        self._ended = threading.Event()
        self._token = ""

    def acquire(self) -> Holder | None:
        """Take the lock, until :meth:`release` or the end of the process; return who left it behind, if anybody.

        Raises:
            FolderInUse: Another process holds it.
            OSError: The folder cannot be written to.
        """
        try:
            locked = self._lock_file()
            left = self.in_use()
            self._sign()
            if not locked:
                self._give_way()
        except BaseException:
            self._lock.release()
            raise
        threading.Thread(target=self._beat, name=f"lock on {self.folder}", daemon=True).start()
        return left

    def release(self) -> None:
        """Free the lock, if it is held."""
        if not self._token:
            return
        self._ended.set()
        found = self.holder()
        if found is not None and found.token == self._token:
            with suppress(OSError):
                self.holder_file.unlink()
        self._token = ""
        self._lock.release()

    def holder(self) -> Holder | None:
        """Return the process that holds the lock, or left it behind; None where there is none."""
        try:
            return Holder(**json.loads(self.holder_file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def in_use(self) -> Holder | None:
        """Return who left the lock behind, if anybody, without taking it.

        Raises:
            FolderInUse: Its holder is running, or gave a sign of life shortly before.
        """
        found = self.holder()
        if found is None:
            return None
        if found.is_here:
            if found.is_running:
                raise FolderInUse(found)
            return found
        silent = self._silent_seconds()
        if silent < SILENT_SECONDS:
            raise FolderInUse(found, silent)
        return found

    def _lock_file(self) -> bool:
        """Lock the file; return False where the file system has no locks, and the signs of life are all there is."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FolderInUse(self._named()) from error
        except NotImplementedError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _give_way(self) -> None:
        """Give way to another process that signed at the same moment: the last to sign stays."""
        time.sleep(MEET_SECONDS)
        found = self.holder()
        if found is not None and found.token != self._token:
            self._token = ""
            raise FolderInUse(found)

    def _named(self) -> Holder | None:
        """Return the holder, who says who it is a moment after it took the lock."""
        for _ in range(20):
            if (found := self.holder()) is not None:
                return found
            time.sleep(0.05)
        return None

    def _silent_seconds(self) -> float:
        """Return the seconds since the last sign of life, by the clock of the file system, which all machines share."""
        probe = self.folder / f".{uuid4().hex[:12]}.clock"
        try:
            probe.touch()
            return probe.stat().st_mtime - self.holder_file.stat().st_mtime
        except FileNotFoundError:
            return SILENT_SECONDS
        finally:
            probe.unlink(missing_ok=True)

    def _sign(self) -> None:
        holder = Holder(
            socket.gethostname(), os.getpid(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"), _machine(),
            _started(os.getpid()) or 0.0, uuid4().hex,
        )  # fmt: skip
        partial = self.holder_file.with_suffix(f".{holder.token[:12]}")
        try:
            partial.write_text(json.dumps(asdict(holder)), "utf-8")
            partial.replace(self.holder_file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._token = holder.token

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a sign that is missed is given again
                os.utime(self.holder_file)


def _machine() -> str:
    """Return what tells this start of this machine, and this group of processes, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """Return when the process of an id started, in seconds; None where there is none."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 2)
    except psutil.Error:
        return None
