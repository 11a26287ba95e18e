"""The room that a run's files take on the disk, compared with what is free before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..utils.disk import existing, free_bytes
from ..utils.memory import MemorySettings, checkpoint_bytes, gigabytes
from . import builders
from .output_folder import checkpoint_folders
from .planned_memory import planned_memory

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..settings.run_settings import RunSettings


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run writes beside its caches.

    Attributes:
        checkpoint_bytes: Of one checkpoint.
        num_checkpoints: How many are there at the end.
        student_bytes: Of what is exported.
    """

    checkpoint_bytes: int
    num_checkpoints: int
    student_bytes: int

    @property
    def total(self) -> int:
        """All bytes that are there at the end."""
        return self.checkpoint_bytes * self.num_checkpoints + self.student_bytes

    def parts(self) -> dict[str, int]:
        """Return what takes the room -> bytes."""
        count = f"{self.num_checkpoints} checkpoint{'s' if self.num_checkpoints != 1 else ''}"
        return {
            f"{count} of {gigabytes(self.checkpoint_bytes)}": self.checkpoint_bytes * self.num_checkpoints,
            "student": self.student_bytes,
        }


def disk_plan(run: RunSettings, memory: MemorySettings, *, steps: int | None = None) -> DiskPlan:
    """Return the plan of a run.

    Args:
        run: The settings.
        memory: What is trained, and in which types.
        steps: Optimizer steps of the run, where they are known.
    """
    trained, exported = memory.trained_parameters, memory.student_parameters
    steps = steps or run.max_train_steps
    saves = math.inf if steps is None else 1
    if run.checkpoint_step_interval and steps is not None:
        saves = math.ceil(steps / run.checkpoint_step_interval)
    kept = min(saves, run.checkpoints_total_limit or math.inf)
    dtype = builders.export_dtype(run)
    item = memory.trained_bytes if dtype is None else builders.ITEM_BYTES[dtype]
    student = (trained if exported is None else exported) * item
    return DiskPlan(checkpoint_bytes(memory), 1 if math.isinf(kept) else int(kept), round(student))


def planned_disk(
    configuration: Configuration, registry: Registry, *, family: ModelFamily | None = None
) -> DiskPlan | None:
    """Return the plan from the configuration and the model's config alone; None where the family has none."""
    family = family or builders.build_family(configuration, registry)
    memory = planned_memory(configuration, registry, family=family, activations=False)
    if memory is None:
        return None
    return disk_plan(configuration.run, memory)


def disk_problem(plan: DiskPlan, output_dir: Path) -> str | None:
    """Return why a run's files will not fit beside what is there; None where they will.

    Args:
        plan: Of the run.
        output_dir: Its folder; checkpoints that lie there already are replaced by the ones to come.
    """
    free, there = free_bytes(output_dir), num_bytes(checkpoint_folders(output_dir))
    if plan.total <= free + there:
        return None
    parts = ", ".join(f"{name}: {gigabytes(size)}" for name, size in plan.parts().items())
    return (
        f"output_dir = {output_dir}: this run will write {gigabytes(plan.total)} ({parts}), and "
        f"{gigabytes(free)} are free on the disk of {existing(output_dir)}"
    )


def require_room(plan: DiskPlan, output_dir: Path) -> None:
    """Raise UserError where a run's files will not fit, before training begins."""
    problem = disk_problem(plan, output_dir)
    if problem is not None:
        raise UserError(problem, disk_remedy(plan, output_dir))


def disk_remedy(plan: DiskPlan, output_dir: Path) -> str:
    """Return how to make the run's files fit."""
    room = free_bytes(output_dir) + num_bytes(checkpoint_folders(output_dir)) - plan.student_bytes
    fitting = int(room // max(plan.checkpoint_bytes, 1))
    fewer = f"keep fewer: checkpoints_total_limit={fitting}; " if 1 <= fitting < plan.num_checkpoints else ""
    return f"{fewer}choose another disk: --output-dir DIR; or free some room"


def num_bytes(folders: Sequence[Path]) -> int:
    """Return the bytes of all files in these folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir() if file.is_file())
