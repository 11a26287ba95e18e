"""Checkpoints that are complete or absent, never half written, and that hold no pickle.

A checkpoint is written to a temporary folder (``.checkpoint-<n>.partial``), each file and folder fsynced, its manifest
of checksums last, and renamed to ``checkpoint-<n>`` in one operation. Whenever the process dies, the folders named
``checkpoint-<n>`` are complete. A partial that already has its manifest is complete too: the next start finishes its
rename.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import UserError
from ..utils.disk import DiskFull, free_bytes, is_disk_full
from ..utils.files import sha256, sync_file, sync_folder
from ..utils.tensor_tree import load_optimizer, optimizer_to_tensors, storable, tensors_to_optimizer
from .manifest import FORMAT, GROUP, MANIFEST, META, manifest_entries, read_manifest

if TYPE_CHECKING:
    from .sharded_checkpoint import ShardedTensors

__all__ = ["CheckpointState", "CheckpointStore", "load_optimizer", "optimizer_to_tensors", "tensors_to_optimizer"]

logger = logging.getLogger(__name__)
META_BYTES = 1 << 16
"""Room for what is no tensor."""
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-(\d+)\.(partial|replaced|deleted)")


@dataclass
class CheckpointState:
    """Everything that decides the future of a run.

    Attributes:
        step: Optimizer steps taken.
        tensors: Group name -> tensor name -> tensor; each group becomes ``<group>.safetensors``.
        meta: All other state, as JSON values (floats round-trip exactly).
        sharded: Tensors of which each process holds a part, if there are any; then all processes write.
        copies: Group and name of tensors that nothing else holds, as those that were gathered for this state.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    sharded: ShardedTensors | None = None
    copies: frozenset[tuple[str, str]] = frozenset()


class CheckpointStore:
    """The checkpoints of one output folder.

    Args:
        output_dir: Folder of the run.
        limit: Number of newest checkpoints to keep; None or 0 keeps all.
        read_only: For ranks that do not save: nothing is cleaned up, and :meth:`save` is refused.
    """

    def __init__(self, output_dir: Path, *, limit: int | None, read_only: bool = False) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"limit must be 0 (keep all) or more, not {limit}")
        self.output_dir = Path(output_dir)
        self.limit = limit or None
        self.read_only = read_only
        if not read_only:
            self._recover()

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first. Checksums are left to :meth:`load`."""
        return [path for _, path in sorted(self._complete().items())]

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        paths = self.all()
        return paths[-1] if paths else None

    def save(self, state: CheckpointState, *, step: int | None = None) -> Path:
        """Write `state` as ``checkpoint-<step>`` and remove the oldest ones beyond the limit.

        A checkpoint of the same step is replaced. With sharded tensors every process calls it, those whose store is
        read-only as well: they write their parts, and all return when it is complete.

        Args:
            state: The state to keep.
            step: Optimizer steps taken; ``state.step`` unless given, and never another number.
        """
        if self.read_only and state.sharded is None:
            raise ValueError("this CheckpointStore was opened read-only")
        if step is not None and step != state.step:
            raise ValueError(f"step {step} is not the state's {state.step}")
        final, partial = self.output_dir / f"checkpoint-{state.step}", self._temporary(state.step, "partial")
        synchronized = nullcontext if state.sharded is None else state.sharded.exchange.synchronized
        try:
            with synchronized(), _naming_full_disk(final, state):
                if not self.read_only:
                    self._prepare(partial, state)
            if state.sharded is not None:
                with synchronized(), _naming_full_disk(final, state):
                    entries = state.sharded.write(partial)
                state.sharded.gather(entries)
            with synchronized(), _naming_full_disk(final, state):
                if not self.read_only:
                    _write(partial, state)
                    self._move_into_place(partial, final)
                    self._prune(keep=final)
        except BaseException:
            if not (self.read_only or _is_complete(partial)):  # a full disk is not to be kept full by what is no use
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def _prepare(self, partial: Path, state: CheckpointState) -> None:
        """Make the empty folder where a checkpoint is written before it is renamed, and room on its disk."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        self._make_room(_num_bytes(state))
        partial.mkdir()

    def load(self, path: Path, *, whole: bool = True) -> CheckpointState:
        """Read a checkpoint after verifying every file's checksum; tensors lie on the CPU.

        Args:
            path: Its folder.
            whole: Whether sharded tensors are read too, whole; else each process reads its parts of them.

        Raises:
            UserError: The folder is no complete checkpoint, or a file in it is not what was written.
        """
        from safetensors.torch import load_file

        path = Path(path)
        manifest = self._manifest(path)
        for name, entry in manifest["files"].items():
            self._verify(path / name, entry)
        tensors = {group: load_file(path / f"{group}.safetensors") for group in manifest["groups"]}
        if whole and manifest["sharded"]:
            from .sharded_checkpoint import read_whole

            for group, found in read_whole(path).items():
                tensors.setdefault(group, {}).update(found)
        meta = json.loads((path / META).read_text("utf-8"))
        return CheckpointState(step=manifest["step"], tensors=tensors, meta=meta)

    def discard_after(self, step: int) -> list[Path]:
        """Remove checkpoints of later steps: a run that goes on from an older one must not find them as its own."""
        later = [path for number, path in sorted(self._complete().items()) if number > step]
        for path in later:
            self._delete(path)
        return later

    def download(self, step: int | None = None) -> None:
        """Download a checkpoint that is not here, where a copy of them is kept in another place.

        Args:
            step: Its step; None for the newest.
        """

    def wait(self) -> None:
        """Wait until all copies are done; called when the run ends."""

    def passed_over(self) -> list[tuple[Path, str]]:
        """Return each folder that is named as a checkpoint and is none, with the reason, oldest first."""
        named = [path for path in _folders(self.output_dir) if _NAME.fullmatch(path.name)]
        return [(path, flaw) for path in sorted(named, key=_step_of) if (flaw := _flaw(path)) is not None]

    # -- the moves --------------------------------------------------------------------------------------------------

    def _temporary(self, step: int, suffix: str) -> Path:
        return self.output_dir / f".checkpoint-{step}.{suffix}"

    def _fresh(self, step: int) -> Path:
        """Return the empty place where a checkpoint is written before it is renamed."""
        partial = self._temporary(step, "partial")
        _remove(partial)
        return partial

    def _complete(self) -> dict[int, Path]:
        found: dict[int, Path] = {}
        for path in _folders(self.output_dir):
            match = _NAME.fullmatch(path.name)
            if match and _is_complete(path):
                found[int(match[1])] = path
        return found

    def _move_into_place(self, partial: Path, final: Path) -> None:
        if final.exists():
            # Dying between these two renames loses nothing: the partial has its manifest, and the next start moves it.
            replaced = self._temporary(_step_of(final), "replaced")
            _remove(replaced)
            os.rename(final, replaced)
            os.rename(partial, final)
            sync_folder(self.output_dir)
            _remove(replaced)
            return
        os.rename(partial, final)
        sync_folder(self.output_dir)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the oldest checkpoints beyond the limit now rather than afterwards, where the disk has no room.

        Raises:
            DiskFull: There is no room even so; nothing was removed for nothing.
        """
        others, kept = self.all(), self._kept()
        spare = [] if self.limit is None else others[: max(len(others) + 1 - self.limit, 0)]
        spare = [path for path in spare if path not in kept and path != others[-1]]
        free = free_bytes(self.output_dir)
        if free + sum(_folder_bytes(path) for path in spare) < num_bytes:
            raise DiskFull(self.output_dir, "there is no room for the next checkpoint", needed_bytes=num_bytes)
        while free < num_bytes:
            oldest = spare.pop(0)
            logger.info(f"{oldest.name} is removed before the next checkpoint is written: there is no room for both")
            self._delete(oldest)
            free = free_bytes(self.output_dir)

    def _prune(self, *, keep: Path) -> None:
        if self.limit is None:
            return
        others, kept = [path for path in self.all() if path != keep], self._kept()
        for path in others[: max(len(others) + 1 - self.limit, 0)]:
            if path not in kept:
                self._delete(path)

    def _kept(self) -> list[Path]:
        """Return checkpoints that must not be removed now, although they are beyond the limit."""
        return []

    def _delete(self, path: Path) -> None:
        """Rename the folder out of sight, then remove it: half a folder must not bear a checkpoint's name."""
        temporary = self._temporary(_step_of(path), "deleted")
        _remove(temporary)
        os.rename(path, temporary)
        _remove(temporary)

    def _recover(self) -> None:
        """Finish or remove what a killed process left."""
        for path in _folders(self.output_dir):
            match = _LEFTOVER.fullmatch(path.name)
            if not match:
                continue
            final = self.output_dir / f"checkpoint-{match[1]}"
            if match[2] == "partial" and _is_complete(path) and not final.exists():
                os.rename(path, final)
                sync_folder(self.output_dir)
            else:
                _remove(path)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _manifest(self, path: Path) -> dict[str, Any]:
        try:
            manifest = read_manifest(path)
        except FileNotFoundError:
            raise UserError(f"{path} is no checkpoint: it has no {MANIFEST}", self._instead_of(path)) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path / MANIFEST} is corrupt: {error}", self._instead_of(path)) from error
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {manifest.get('format')!r}; this version reads {FORMAT}",
                "Resume with the version of distill that wrote it, or start afresh in another output_dir.",
            )
        return manifest

    def _verify(self, path: Path, entry: Mapping[str, Any]) -> None:
        if not path.is_file():
            raise UserError(f"checkpoint file {path} is missing", self._instead_of(path.parent))
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise UserError(
                f"checkpoint file {path} is corrupt: it is not what was written", self._instead_of(path.parent)
            )

    def _instead_of(self, path: Path) -> str:
        others = [other.name for other in self.all() if other.resolve() != path.resolve()]
        return f"Remove the folder {path} to resume from " + (f"{others[-1]}." if others else "the start.")


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _is_complete(path: Path) -> bool:
    return _flaw(path) is None


def _flaw(path: Path) -> str | None:
    """Return why a folder is no complete checkpoint; None where every file of the manifest is there at its size.

    Cheap: no file but the manifest is read.
    """
    try:
        files = read_manifest(path)["files"]
        sizes = {name: (path / name).stat().st_size for name in files}
        wrong = [(name, size) for name, size in sizes.items() if size != files[name]["bytes"]]
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):  # of another version's, too
        return f"its {MANIFEST} is damaged"
    return next((f"{name} has {size} bytes instead of {files[name]['bytes']}" for name, size in wrong), None)


def _num_bytes(state: CheckpointState) -> int:
    """Return about how many bytes a state takes on disk."""
    plain = sum(tensor.nbytes for group in state.tensors.values() for tensor in group.values())
    return plain + META_BYTES + (state.sharded.num_bytes if state.sharded else 0)


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _write(folder: Path, state: CheckpointState) -> None:
    from safetensors.torch import save_file

    shards = state.sharded.entries if state.sharded else {}
    for group, tensors in state.tensors.items():
        if not GROUP.fullmatch(group):
            raise ValueError(f"{group!r} cannot name a file: letters, digits, '_', '.' and '-' can")
        save_file(storable(tensors), folder / f"{group}.safetensors")
    (folder / META).write_text(json.dumps(state.meta), "utf-8")
    files = sorted(path for path in folder.iterdir() if path.name not in shards)
    for path in files:
        sync_file(path)
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "groups": list(state.tensors),
        "files": manifest_entries(files) | shards,
        **({"sharded": list(state.sharded.groups)} if state.sharded else {}),
    }
    temporary = folder / f"{MANIFEST}.partial"
    temporary.write_text(json.dumps(manifest, indent=2), "utf-8")
    sync_file(temporary)
    os.rename(temporary, folder / MANIFEST)
    sync_folder(folder)


@contextmanager
def _naming_full_disk(final: Path, state: CheckpointState) -> Iterator[None]:
    try:
        yield
    except DiskFull:
        raise
    except BaseException as error:
        if is_disk_full(error):
            raise DiskFull(final, "the disk is full", needed_bytes=_num_bytes(state)) from error
        raise


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
