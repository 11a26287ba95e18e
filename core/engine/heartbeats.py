"""Signs of life that the processes of a run give each other, so that one that hangs or dies is named.

The first process may validate for hours while the others wait, so no exchange has a time limit. Instead each process
says every few seconds that it is there, through the store that the process group was made with, and what its main
thread does. A process that is silent for longer than the limit is lost; so is one whose main thread stays at one step
while the others wait for it there, and one that says that it failed.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import DistillError, Interrupted, UserError, described
from ..utils.disk import chain

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)
EVERY_SECONDS = 2.0
"""Time between two signs of life, where the limit is not short itself."""
DEAD_SECONDS = 10.0
"""Time in which the reason is looked for when an exchange fails."""
LAST_WORDS_SECONDS = 5.0
STUCK_SECONDS = 60.0
"""Time after which a process ends that waits, where nothing can wake it, for one that is lost."""


def summary(error: BaseException, *, rank: int) -> tuple[int, str]:
    """Return exit code and text of an error of process `rank`, since errors themselves may not be picklable."""
    if isinstance(error, DistillError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code, "interrupted"
    return DistillError.exit_code, f"process {rank} failed: {described(error)}"


def retold(exit_code: int, text: str) -> DistillError:
    """Return the error that another process summed up."""
    kinds = {kind.exit_code: kind for kind in (DistillError, UserError, Interrupted)}
    return kinds.get(exit_code, DistillError)(text)


class Life:
    """What is known of another process.

    Args:
        rank: Its rank.
        host: Its machine.
        pid: Its id there.
    """

    def __init__(self, rank: int, *, host: str, pid: int) -> None:
        self.rank, self.host, self.pid = rank, host, pid
        self.said: dict[str, Any] = {}
        self.heard = self.moved = time.monotonic()

    def hear(self, said: dict[str, Any], *, exchanges: int) -> None:
        """Note what it says, and since when.

        Args:
            said: By its latest sign of life.
            exchanges: Exchanges that this process has come to: it waits for one that has come to fewer.
        """
        now = time.monotonic()
        if said["beat"] != self.said.get("beat"):
            self.heard = now
        moved = said["exchanges"] != self.said.get("exchanges") or said["exchanges"] >= exchanges
        if moved or not said["training"] or said["alone"]:
            self.moved = now
        self.said = said

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    def is_gone(self) -> bool:
        """Return True if it ran on this machine and does so no more."""
        if self.host != socket.gethostname():
            return False
        import psutil

        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Heartbeats:
    """This process's signs of life, and those of the others.

    Args:
        store: A connection of its own to the process group's store, since a call may wait.
        rank: Of this process.
        world_size: Number of processes.
        timeout_seconds: Silence after which a process is lost; 0 for no limit.
    """

    def __init__(self, store: Store, *, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.rank, self.timeout = rank, timeout_seconds
        self.lost: DistillError | None = None
        """What ends the run."""
        self.hanging = False
        """Whether a process that is lost may still hold its connections, so that leaving them would never end."""
        self.on_stuck: Callable[[DistillError], None] | None = None
        """Called where the run is to end and nothing wakes the main thread; the process ends afterwards."""
        self._store, self._stopped = store, threading.Event()
        self._every = min(EVERY_SECONDS, timeout_seconds / 5) if timeout_seconds else EVERY_SECONDS
        self._beat, self._exchanges, self._alone, self._training, self._noticed = 0, 0, 0, False, False
        self._answered = time.monotonic()
        self._set("who", {"host": socket.gethostname(), "pid": os.getpid()})
        self._say()
        self.others = {other: Life(other, **self._get("who", other)) for other in range(world_size) if other != rank}
        self._threads = [
            threading.Thread(target=target, name="heartbeats", daemon=True) for target in (self._speak, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    # -- what the main thread says ----------------------------------------------------------------------------------

    @contextmanager
    def training(self) -> Iterator[None]:
        """Tell the others that each step of the block is short: one that takes longer than the limit hangs."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Tell the others that nobody is waited for in the block, which may take hours."""
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Make an error of an exchange in the block that of the process that is lost."""
        self.check()
        self._exchanges += 1
        try:
            yield
        except RuntimeError as error:  # of gloo and NCCL
            explained = self._explained(error)
            self._noticed = True
            raise explained from error

    @contextmanager
    def exchange_beside(self) -> Iterator[None]:
        """Make an error of an exchange in the block, by a thread beside the main one, that of the process that is lost.

        The main thread has yet to notice it.
        """
        try:
            yield
        except RuntimeError as error:
            raise self._explained(error) from error

    def check(self, *, beside: bool = False) -> None:
        """Raise DistillError if a process is lost.

        Args:
            beside: Asked by a thread beside the main one, which has yet to notice it.
        """
        if self.lost is not None:
            self._noticed = self._noticed or not beside
            raise self.lost

    def end(self, error: BaseException | None = None) -> None:
        """Give no more signs of life; tell the others what this process fails with."""
        self._noticed = True
        if error is not None and self.lost is None and not self._stopped.is_set():
            words = threading.Thread(target=self._set, args=("end", summary(error, rank=self.rank)), daemon=True)
            words.start()
            words.join(LAST_WORDS_SECONDS)  # a store that hangs is not to keep this process

    def close(self) -> None:
        """End the threads: one that is inside the store when the interpreter ends would abort the process."""
        atexit.unregister(self.close)
        self._stopped.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(LAST_WORDS_SECONDS)  # a store that hangs is not to keep this process

    # -- the threads ------------------------------------------------------------------------------------------------

    def _speak(self) -> None:
        """Give signs of life and hear those of the others; a store that is gone is noticed by the other thread."""
        try:
            while not self._stopped.wait(self._every):
                self._say()
                for rank, life in self.others.items():
                    life.hear(self._get("beat", rank), exchanges=self._exchanges)
                    if self._store.check([self._key("end", rank)]):
                        self._lose(retold(*self._get("end", rank)))
                self._answered = time.monotonic()
        except RuntimeError as error:  # torch.distributed's errors
            logger.debug(f"the store of the processes does not answer: {error}")

    def _watch(self) -> None:
        before = time.monotonic()
        while self.lost is None and not self._stopped.wait(self._every):
            now = time.monotonic()
            if now - before > self._every + self.timeout / 2:  # it was this process that stood still
                self._answered = now
                for life in self.others.values():
                    life.heard = life.moved = now
            before = now
            if self.timeout and (reason := self._silent(now)):
                self._lose(DistillError(reason), hanging=True)
        if self.lost is not None:
            self._wait_for_main()

    def _silent(self, now: float) -> str | None:
        """Return who has been silent, or at one step, for longer than the limit."""
        limit = f"{self.timeout:g} s (process_timeout)"
        for life in self.others.values():
            if now - life.heard > self.timeout and now - self._answered < self.timeout:
                return f"{life} hangs: it has given no sign of life for {limit}"
        for life in self.others.values():
            if now - life.moved > self.timeout and now - life.heard < self.timeout / 2:
                return f"{life} hangs: the others have waited for it in a step for {limit}"
        if now - self._answered > self.timeout:
            host = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "process 0"
            return f"{host} hangs: it holds the store of the processes, which has not answered for {limit}"
        return None

    def _lose(self, error: DistillError, *, hanging: bool = False) -> None:
        if self.lost is None:
            self.lost, self.hanging = error, hanging

    def _wait_for_main(self) -> None:
        """End the process where the main thread is in an exchange that nothing wakes it from."""
        waited = 0.0
        while waited < STUCK_SECONDS:
            if self._noticed or self._stopped.wait(self._every):
                return
            waited = 0.0 if self._alone else waited + self._every
        assert self.lost is not None
        if self.on_stuck is not None:
            self.on_stuck(self.lost)
        os._exit(self.lost.exit_code)

    def reason(self, error: BaseException) -> DistillError | None:
        """Return why an exchange failed that a library made by itself; None where `error` is of another kind."""
        if error is self.lost or not any(_is_of_exchange(each) for each in chain(error)):
            return None
        self._noticed = True
        return self._explained(error)

    # -- the reason -------------------------------------------------------------------------------------------------

    def _explained(self, error: BaseException) -> DistillError:
        """Return why an exchange failed, which a process that dies may take a moment to show."""
        end = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < end and self.lost is None:
            for life in self.others.values():
                if life.is_gone():
                    self._lose(
                        DistillError(
                            f"{life} is gone without a word: it was killed, by somebody or by the system because "
                            "memory ran out"
                        )
                    )
            time.sleep(0.1)
        self._lose(DistillError(f"the exchange with the other processes failed: {described(error)}"))
        assert self.lost is not None
        return self.lost

    # -- the store --------------------------------------------------------------------------------------------------

    def _key(self, what: str, rank: int) -> str:
        return f"distill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{what}/{rank}"

    def _set(self, what: str, value: object) -> None:
        self._store.set(self._key(what, self.rank), json.dumps(value))

    def _get(self, what: str, rank: int) -> Any:
        return json.loads(self._store.get(self._key(what, rank)))

    def _say(self) -> None:
        self._beat += 1
        said: Mapping[str, object] = {
            "beat": self._beat, "exchanges": self._exchanges, "training": self._training, "alone": bool(self._alone),
        }  # fmt: skip
        self._set("beat", said)


def _is_of_exchange(error: BaseException) -> bool:
    """Return True if `error` is of NCCL, or of gloo, whose errors have no kind of their own."""
    import torch

    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def connected(*, rank: int, world_size: int, timeout_seconds: float) -> Heartbeats | None:
    """Return the heartbeats of this process; None where the group was not made through a store with an address."""
    from torch.distributed import TCPStore

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        return None
    store = TCPStore(address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(days=7))
    return Heartbeats(store, rank=rank, world_size=world_size, timeout_seconds=timeout_seconds)


@contextmanager
def meeting(timeout_seconds: float) -> Iterator[None]:
    """End this process where the block, in which all processes meet, takes longer than the limit; 0 for no limit.

    One that died before the others knew of it has left nothing by which it could be named.
    """
    timer = threading.Timer(timeout_seconds, _give_up, [timeout_seconds])
    timer.daemon = True
    if timeout_seconds and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(timeout_seconds: float) -> None:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    logger.error(
        f"the {os.environ['WORLD_SIZE']} processes have not met at {where} within {timeout_seconds:g} s "
        "(process_timeout): one of them did not start, or has ended"
    )
    os._exit(DistillError.exit_code)
