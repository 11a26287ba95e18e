"""What happens before anything is loaded: the output folder is opened for one run, and what it needs is compared with
what is there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.cache.cache_paths import CachePaths, dataset_folders
from ..errors import UserError
from ..utils.disk import require_writable
from .disk_plan import disk_plan, require_room
from .memory_plan import can_be_quantised, counted, division_of, memory_warning
from .output_folder import (
    CACHE_FOLDER,
    EVALUATION,
    ONLINE_FOLDER,
    REPORTS_FOLDER,
    RESOLVED,
    STUDENT_FOLDER,
    check_output_dir,
    checkpoint_folders,
)
from .run_files import RunFiles
from .run_lock import lock_folder
from .run_log import FILE as LOG
from .run_log import RunLog

if TYPE_CHECKING:
    from ..engine.checkpoint import CheckpointStore
    from ..settings.configuration import Configuration
    from ..utils.locks import FolderLock
    from .components import RunComponents

logger = logging.getLogger(__name__)
SINGLE_FILES = (LOG, RESOLVED, "metrics.jsonl", "report.html", *EVALUATION)
NOT_WATCHED = (*SINGLE_FILES, STUDENT_FOLDER, ONLINE_FOLDER, REPORTS_FOLDER, CACHE_FOLDER)
MINIATURE = (
    "no model named: this distils the miniature that ships with the family, a small but real and trained model for "
    "trying things out. Your own: --model PATH_OR_ID --data FILE (`distill config init` writes both files)"
)


class OpenFolder:
    """The output folder of one run: locked, with its log, and with the list of what is written into it.

    Args:
        folder: The output folder.
        log: Of the run.
    """

    def __init__(self, folder: Path, log: RunLog) -> None:
        self.folder, self._log = folder, log
        self._lock: FolderLock | None = None
        self.files = RunFiles(folder)
        self.watched: tuple[str, ...] = ()
        """Names at the top of the folder that trackers write to."""

    def open(self, run: RunComponents) -> None:
        """Lock the folder, remove an earlier run where that is asked for, and begin the log with the notices.

        Raises:
            UserError: The folder is in use, holds something else, or it or a cache folder cannot be written to.
        """
        check_output_dir(run.config)  # a folder that is somebody else's gets no file of ours
        require_writable(self.folder, name="output_dir", remedy="choose another folder: --output-dir DIR")
        check_cache_folders(run.config)
        self._lock = lock_folder(self.folder)
        state = check_output_dir(run.config)
        if run.remote_checkpoints and (run.settings.overwrite or not run.settings.resume_from_checkpoint):
            run.remote_checkpoints.begin_afresh(overwrite=run.settings.overwrite)
        if state.clear:
            RunFiles(self.folder).remove()
        self.files = RunFiles(self.folder)
        self.files.claim(*SINGLE_FILES)
        self._log.open(self.folder)
        for notice in (*run.config.notices, *state.notices):
            logger.info(notice)

    def close(self) -> None:
        """Close the log and free the folder."""
        self._log.close()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """Note what is written in the block; other processes than the first, which write nothing, note nothing."""
        with self.files.writing(*names) if self._lock is not None else nullcontext():
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note as the run's what trackers make in the block, and what those of an earlier session made."""
        if self._lock is None:
            yield
            return
        grown = [name for name in self.files.claimed if _is_watched(name) and (self.folder / name).exists()]
        self.files.claim(*grown)
        with self.files.watching() as made:
            yield
        self.watched = (*grown, *made)

    def note_checkpoints(self) -> None:
        """Note as the run's the complete checkpoints that came from another place."""
        self.files.adopt(
            *(path.name for path in checkpoint_folders(self.folder) if path.name not in self.files.claimed)
        )


def _is_watched(name: str) -> bool:
    return name not in NOT_WATCHED and not name.startswith(("checkpoint-", "validation"))


def check_cache_folders(configuration: Configuration) -> None:
    """Raise UserError for a cache folder that cannot be written to, before anything is loaded or encoded."""
    paths = CachePaths(configuration, configuration.run.output_dir / CACHE_FOLDER)
    keys = dict(_cache_keys(configuration))
    for folder in dataset_folders(paths, configuration.datasets):
        name = keys.get(folder, "the cache folder")
        require_writable(folder, name=name, remedy="name a folder that can be written to", make=False)


def _cache_keys(configuration: Configuration) -> Iterator[tuple[Path, str]]:
    """Yield each cache folder that the data file names, with its key."""
    for entry in (*configuration.datasets, *configuration.caches):
        for key in ("cache_dir_vae", "cache_dir"):
            if (folder := getattr(entry, key)) is not None:
                yield Path(folder), f"data.{entry.id}.{key}"


def check_resources(run: RunComponents, *, steps: int | None = None) -> None:
    """Compare disk and memory with what the run will need.

    Args:
        run: Its parts; no weights are loaded.
        steps: Optimizer steps, where they are known; memory is compared before they are.

    Raises:
        UserError: What the run writes will not fit on the disk.
    """
    memory = run.planned_memory
    if memory is None or not run.processes.main:
        return
    plan = disk_plan(run.settings, memory, steps=steps)
    require_room(plan, run.settings.output_dir)
    if steps is not None:
        return
    device, division = str(run.processes.device), division_of(run)
    warning = memory_warning(counted(run, memory), device, quantizers=can_be_quantised(run), division=division)
    if warning is not None:
        logger.warning(warning)


def passed_over(store: CheckpointStore, wanted: str | None) -> None:
    """Name each checkpoint that a resume passes over, with the reason.

    Args:
        store: The run's checkpoints.
        wanted: ``resume_from_checkpoint``.

    Raises:
        UserError: The latest is wanted, and there are only such ones.
    """
    if not wanted:
        return
    found = store.passed_over()
    for path, reason in found:
        logger.warning(f"{path.name} is passed over: {reason}")
    if wanted == "latest" and found and store.latest() is None:
        names = "; ".join(f"{path.name}: {reason}" for path, reason in found)
        raise UserError(
            f"resume_from_checkpoint = latest: no checkpoint in {store.output_dir} is complete ({names})",
            "restore one of them; start over: --overwrite; or choose another folder: --output-dir DIR",
        )


def miniature_note(configuration: Configuration) -> str:
    """Return the line about a run on the miniature that ships with the family, named or for want of a model."""
    if configuration.miniature_named:
        return f"the model named is {configuration.run.model_family}'s miniature"
    return MINIATURE
