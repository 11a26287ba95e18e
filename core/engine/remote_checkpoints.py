"""Copies of checkpoints in another place, so that a run can resume from there after this machine is gone.

A complete checkpoint is uploaded file by file, its manifest last: there, too, a checkpoint is complete or absent. A
failed upload is a warning and is tried again with the next one; the local checkpoint is never touched by it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import BadValue, DistillError, UserError
from ..plugin_api.backend import DataBackend
from .checkpoint import CheckpointState, CheckpointStore
from .manifest import MANIFEST, read_manifest

logger = logging.getLogger(__name__)
BLOCK = 1 << 24
_KEY = re.compile(r"checkpoint-(\d+)/([^/]+)")


class RemoteCheckpoints:
    """The checkpoints of one run in another place.

    Args:
        entry: Id of the data file's entry.
        backend: The backend of that place.
        limit: Number of newest checkpoints kept there; None keeps all.
    """

    def __init__(self, entry: str, backend: DataBackend, *, limit: int | None) -> None:
        self.entry, self.backend, self.limit = entry, backend, limit or None
        self._can_remove = True

    def files(self) -> dict[int, set[str]]:
        """Return step -> names of the files there. Raises UserError where the place cannot be listed."""
        found: dict[int, set[str]] = {}
        try:
            for entry in self.backend.list():
                if match := _KEY.fullmatch(entry.key):
                    found.setdefault(int(match[1]), set()).add(match[2])
        except BadValue as error:
            raise UserError(f"data.{self.entry}.{error}", error.remedy) from error
        return found

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        return sorted(step for step, names in self.files().items() if MANIFEST in names)

    def upload(self, folder: Path) -> None:
        """Copy a complete checkpoint there, the manifest last, and remove the oldest beyond the limit."""
        names = [*read_manifest(folder)["files"], MANIFEST]
        for name in names:
            self.backend.upload(f"{folder.name}/{name}", folder / name)
        self._prune()

    def _prune(self) -> None:
        if self.limit is not None and self._can_remove:
            self.remove(self.steps()[: -self.limit])

    def remove(self, steps: list[int]) -> None:
        """Remove checkpoints, the manifest of each first, so that what a failure leaves is no checkpoint."""
        files = self.files() if steps else {}
        for step in steps:
            try:
                for name in sorted(files.get(step, ()), key=lambda name: name != MANIFEST):
                    self.backend.delete(f"checkpoint-{step}/{name}")
            except UserError as error:
                self._can_remove = False
                logger.warning(f"old checkpoints stay in {self.backend.location}: {error.message}")
                return

    def begin_afresh(self, *, overwrite: bool) -> None:
        """Check that no other run's checkpoints are there. Raises UserError where there are, unless `overwrite`."""
        steps = self.steps()
        if steps and not overwrite:
            raise UserError(
                f"{self.backend.location} holds checkpoints of a run, up to step {steps[-1]}",
                "continue it: --set resume_from_checkpoint=latest; replace it: --overwrite; or name another place",
            )
        self.remove(steps)

    def download(self, step: int, folder: Path) -> None:
        """Copy a checkpoint into an empty folder, verified, its manifest last. Raises UserError where it is damaged."""
        folder.mkdir(parents=True)
        waiting = folder / f"{MANIFEST}.there"
        self._copy(f"checkpoint-{step}/{MANIFEST}", waiting)
        for name, expected in read_manifest(folder, waiting.name)["files"].items():
            key = f"checkpoint-{step}/{name}"
            if expected["sha256"] not in (self._copy(key, folder / name) for _ in range(2)):
                raise UserError(
                    f"{key} in {self.backend.location} is not what was written",
                    f"remove checkpoint-{step}/{MANIFEST} there to resume from an older one",
                )
        waiting.rename(folder / MANIFEST)

    def _copy(self, key: str, path: Path) -> str:
        """Copy an object into a file; return the SHA-256 of the bytes received."""
        digest = hashlib.sha256()
        try:
            with self.backend.open(key) as stream, path.open("wb") as file:
                while block := stream.read(BLOCK):
                    file.write(block)
                    digest.update(block)
                file.flush()
                os.fsync(file.fileno())
        except (FileNotFoundError, PermissionError) as error:
            raise DistillError(f"{self.backend.location}{key} cannot be read: {error.strerror or error}") from error
        return digest.hexdigest()


class MirroredStore(CheckpointStore):
    """Local checkpoints, each copied to another place after it is complete, while training goes on.

    Args:
        output_dir: Folder of the run.
        limit: Number of checkpoints to keep in each place.
        there: The other place.
    """

    def __init__(self, output_dir: Path, *, limit: int | None, remote: RemoteCheckpoints) -> None:
        super().__init__(output_dir, limit=limit)
        self._remote = remote
        self._waiting: list[Path] = []
        self._copying: list[Path] = []
        self._running: Future[list[Path]] | None = None
        self._pool = ThreadPoolExecutor(1)

    def save(self, state: CheckpointState, *, step: int | None = None) -> Path:
        """Write a local checkpoint, then begin to copy it; wait first for earlier copies under way."""
        path = super().save(state, step=step)
        self._waiting.append(path)
        if not self._busy:
            self._begin()
        return path

    @property
    def _busy(self) -> bool:
        return self._running is not None and not self._running.done()

    def _kept(self) -> list[Path]:
        """Return the checkpoints being copied, which must stay until that has ended."""
        return self._copying if self._busy else []

    def _begin(self) -> None:
        self._collect()
        self._copying = [path for path in dict.fromkeys(self._waiting) if path.exists()]
        self._running, self._waiting = self._pool.submit(self._copy, self._copying), []

    def _collect(self) -> None:
        """Wait for the copies under way; keep those that failed for the next time."""
        if self._running is not None:
            self._waiting = [*self._running.result(), *self._waiting]
            self._running = None

    def _copy(self, paths: list[Path]) -> list[Path]:
        """Copy checkpoints, the newest first; return those that failed."""
        left = list(paths)
        for path in reversed(paths):
            try:
                self._remote.upload(path)
            except (DistillError, OSError) as error:
                reason = str(error).splitlines()[0]
                logger.warning(f"{path.name} is complete here but could not be copied: {reason}")
                return left
            left.remove(path)
        return left

    def wait(self) -> None:
        """Wait for the copies, try once more those that failed, and report those that are missing in the end."""
        failed = self._running is not None and bool(self._running.result())
        self._collect()
        for _ in range(1 if failed else 2):
            if self._waiting:
                self._begin()
                self._collect()
        newest = self.latest()
        if newest is not None:
            self._prune(keep=newest)
        missing = [path.name for path in self._waiting if path.exists()]
        if missing:
            logger.warning(f"not copied to {self._remote.backend.location}: {', '.join(missing)}")

    def download(self, step: int | None = None) -> None:
        """Download the checkpoint of `step`, or the newest, if it is not here."""
        here, remote = self._complete(), self._remote.steps()
        if step is None:
            wanted = [newest for newest in remote[-1:] if newest > max(here, default=0)]
        else:
            wanted = [step] if step in remote and step not in here else []
        for number in wanted:
            logger.info(f"fetching checkpoint-{number} from {self._remote.backend.location}")
            partial = self._fresh(number)
            self._remote.download(number, partial)
            self._move_into_place(partial, self.output_dir / f"checkpoint-{number}")

    def discard_after(self, step: int) -> list[Path]:
        """Remove later checkpoints in both places."""
        later = [number for number in self._remote.steps() if number > step]
        if later:
            names = ", ".join(f"checkpoint-{number}" for number in later)
            logger.info(f"later checkpoints are removed from {self._remote.backend.location}: {names}")
        self._remote.remove(later)
        return super().discard_after(step)
