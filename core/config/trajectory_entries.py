"""Checks of distillation caches, the data file entries for trajectories (``dataset_type: distillation_cache``)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Finding
from ..settings.dataset_settings import DatasetSettings
from .reading import ConfigReport

KIND = "distillation_cache"
TRAJECTORY_KEYS = (
    "num_pairs_per_prompt", "num_inference_steps", "guidance_scale", "solver", "trajectory_points", "noise_seed",
    "pair_batch_size",
)  # fmt: skip
"""Keys that decide the trajectories."""
CACHE_KEYS = ("id", "type", "dataset_type", "disabled", "default", "cache_dir", "write_batch_size", *TRAJECTORY_KEYS)
"""Keys that such an entry may have."""
USUAL_STEPS = 50


DEFAULTS = {
    key: info.get_default() for key, info in DatasetSettings.model_fields.items() if key not in ("id", "backend")
}


def check_trajectory_keys(entry: DatasetSettings, given: Collection[str], report: ConfigReport) -> DatasetSettings:
    """Refuse keys that stand on the wrong kind of entry, and steps that do not visit even points of the trajectory.

    Args:
        entry: An entry of any kind.
        given: Keys that the entry itself has, rather than the run.
        report: Takes findings.

    Returns:
        The entry; a distillation cache without the defaults that it would take from the run.
    """
    own = TRAJECTORY_KEYS if entry.dataset_type != KIND else tuple(key for key in DEFAULTS if key not in CACHE_KEYS)
    wrong = [key for key in own if key in given and getattr(entry, key) != DEFAULTS[key]]
    if entry.dataset_type != KIND:
        problem = f"is for a distillation cache, and this entry is of dataset_type {entry.dataset_type}"
        remedy = f'move it into an entry {{"id": "trajectories", "dataset_type": "{KIND}"}}'
    else:
        problem = "is not for a distillation cache: its captions and sizes are those of the datasets that use it"
        remedy = f'give it to a dataset of images or prompts, which may name this cache ("{KIND}": "{entry.id}")'
    for key in wrong:
        report.refuse(key, getattr(entry, key), problem, remedy)
    if entry.dataset_type != KIND:
        return entry
    steps, points = entry.num_inference_steps, entry.trajectory_points
    if steps is not None and points is not None and steps % points:
        problem = f"is no multiple of trajectory_points = {points}, so even points are no steps"
        report.refuse("num_inference_steps", steps, problem, f"set it to {_multiple(points, steps)}")
    return entry.model_copy(update={key: DEFAULTS[key] for key in own})


def _multiple(points: int, steps: int) -> int:
    """Return the next multiple of `points` from `steps` on."""
    return -(-steps // points) * points


@dataclass(frozen=True)
class TrajectoryNeeds:
    """The requirements of a run for its distillation caches.

    Attributes:
        method: Name of the method.
        points: Points of the trajectory that it needs; 0 for none at all.
        guidance: The family's usual guidance scale.
        folder: Folder of caches that the data file gives none, for messages.
    """

    method: str
    points: int
    guidance: float
    folder: str


class TrajectoryCheck:
    """The check that gives each dataset its distillation cache and fills in what the entries leave open.

    Args:
        needs: The run's requirements.
        files: Id of an entry -> the file that it comes from.
        findings: Takes the findings.
        notices: Takes the notices.
    """

    def __init__(
        self, needs: TrajectoryNeeds, files: Mapping[str, str], findings: list[Finding], notices: list[str]
    ) -> None:
        self.needs, self.files, self.findings, self.notices = needs, files, findings, notices

    def resolve(
        self, datasets: Sequence[DatasetSettings], caches: Sequence[DatasetSettings]
    ) -> tuple[list[DatasetSettings], list[DatasetSettings]]:
        """Return datasets and caches as they are used; a method that needs a cache and finds none gets one."""
        entries = {entry.id: self._filled(entry) for entry in caches if entry.dataset_type == KIND}
        if not entries and not self.needs.points:
            return list(datasets), list(caches)
        if not entries:
            entries = {each.id: each for each in [self._filled(self._own({entry.id for entry in datasets}))]}
            self._tell_of_own(*entries.values())
        elif not self.needs.points:
            names = ", ".join(f"data.{name}" for name in entries)
            self.notices.append(f"{names}: not used by runs of {self.needs.method}, which needs no trajectories")
        others = [entry for entry in caches if entry.dataset_type != KIND]
        return [self._assigned(entry, entries) for entry in datasets], [*others, *entries.values()]

    def _refuse(self, id: str, key: str, value: object, problem: str, remedy: str) -> None:
        file = self.files.get(id, "data file")
        self.findings.append(Finding(file, f"data.{id}.{key}", value, problem, remedy))

    def _own(self, taken: Collection[str]) -> DatasetSettings:
        name = KIND if KIND not in taken else f"{KIND}-1"
        return DatasetSettings(id=name, dataset_type=KIND, default=True)

    def _tell_of_own(self, entry: DatasetSettings) -> None:
        calls = (2 if (entry.guidance_scale or 0) not in (0, 1) else 1) * (entry.num_inference_steps or 0)
        self.notices.append(
            f"{self.needs.method} learns from what the teacher makes of captions, and the data file has no "
            f"distillation cache: one is made of the captions of all datasets, {entry.num_inference_steps} steps at "
            f"guidance {entry.guidance_scale:g} for each caption and size ({calls} predictions), once, and kept in "
            f'{self.needs.folder}/{entry.id}; an entry {{"id": "trajectories", "dataset_type": "{KIND}"}} of the data '
            "file can say otherwise"
        )

    def _filled(self, entry: DatasetSettings) -> DatasetSettings:
        """Return the entry with its defaults, which depend on method and family."""
        needed = self.needs.points
        points = entry.trajectory_points or needed or 1
        steps = entry.num_inference_steps or _multiple(points, USUAL_STEPS)
        if needed and points % needed:
            problem = (
                f"the method {self.needs.method!r} needs {needed} even points of the trajectory, which {points} are not"
            )
            remedy = f"set trajectory_points to {needed}, or leave it out"
            self._refuse(entry.id, "trajectory_points", entry.trajectory_points, problem, remedy)
        elif steps % points:
            problem = (
                f"is no multiple of the {points} points of the trajectory that the method {self.needs.method!r} needs"
            )
            self._refuse(entry.id, "num_inference_steps", steps, problem, f"set it to {_multiple(points, steps)}")
        guidance = self.needs.guidance if entry.guidance_scale is None else entry.guidance_scale
        filled = {"trajectory_points": points, "num_inference_steps": steps, "guidance_scale": guidance}
        return entry.model_copy(update=filled)

    def _assigned(self, dataset: DatasetSettings, entries: Mapping[str, DatasetSettings]) -> DatasetSettings:
        """Return the dataset with the id of its cache."""
        if dataset.distillation_cache is not None:
            return dataset
        chosen = [entry.id for entry in entries.values() if entry.default] or list(entries)
        if len(chosen) > 1:
            problem = f"is required: there are several, {', '.join(chosen)}"
            self._refuse(dataset.id, KIND, None, problem, 'name one of them, or give one of them "default": true')
        return dataset.model_copy(update={KIND: chosen[0]})
