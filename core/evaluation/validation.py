"""Validation while the student trains: student beside teacher, with the same prompts and seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ..diffusion.guidance import guides
from ..drawing.grid import GridRow, labelled_grid, to_images
from ..errors import UserError
from ..utils.files import save_image
from ..utils.progress import working
from .prompts import encoded
from .sampling import SamplingPlan, describe_guidance, make_images, plural, sampling, teacher_plan

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..diffusion.sampler import Sampler
    from ..engine.tracking import Trackers
    from ..plugin_api.batch import Conditioning
    from ..plugin_api.context import NetworksByRole
    from ..plugin_api.family import ModelFamily
    from ..settings.run_settings import RunSettings

__all__ = ["Shot", "ValidationPlan", "Validator", "describe", "slug"]

FOLDER = "validation"
TEACHER_FOLDER = "teacher"
MANY_ROWS = 8


@dataclass(frozen=True)
class Shot:
    """One image that student and teacher both make: its prompt, size and noise."""

    prompt: str
    width: int
    height: int
    seed: int
    name: str


@dataclass(frozen=True)
class ValidationPlan:
    """The images that are made at each validation.

    Attributes:
        prompts: At least one.
        resolutions: (width, height) in pixels; every prompt at every one.
        student: The student's sampling plan.
        teacher_few: The teacher at as many steps as the student.
        teacher_full: The teacher at its best.
        negative_prompt: Has an effect where there is guidance.
        seed: Seed of the first image of each prompt and resolution.
        num_images: Images of each prompt and resolution, with consecutive seeds.
    """

    prompts: tuple[str, ...]
    resolutions: tuple[tuple[int, int], ...]
    student: SamplingPlan
    teacher_few: SamplingPlan
    teacher_full: SamplingPlan
    negative_prompt: str = ""
    seed: int = 0
    num_images: int = 1

    @classmethod
    def from_run(
        cls,
        run: RunSettings,
        family: ModelFamily,
        sampler: Sampler,
        *,
        prompts: Sequence[str],
        fallback_resolution: tuple[int, int],
        role: str = "student",
    ) -> ValidationPlan:
        """Make the plan that a run's ``validation_*`` keys describe.

        Args:
            run: The settings.
            family: Gives the teacher's usual guidance.
            sampler: The method's sampler, made with the run's validation steps and guidance.
            prompts: ``Configuration.validation_prompts``, or captions of the data where there are none.
            fallback_resolution: (width, height) in pixels, used when the run names none.
            role: The method's role that is validated.

        Raises:
            UserError: There is no prompt at all.
        """
        if not prompts:
            raise UserError(
                "validation_prompt is empty, and the data has no captions to take instead",
                "set validation_prompt, or switch validation off with validation_step_interval=0",
            )
        steps, guidance = sampler.num_inference_steps, run.evaluation_teacher_guidance
        return cls(
            prompts=tuple(prompts),
            resolutions=tuple(run.validation_resolution) or (fallback_resolution,),
            student=SamplingPlan("student", role, sampler, steps, sampler.guidance_scale),
            teacher_few=teacher_plan(family, steps, guidance),
            teacher_full=teacher_plan(family, max(run.evaluation_teacher_steps), guidance),
            negative_prompt=run.validation_negative_prompt,
            seed=run.seed if run.validation_seed is None else run.validation_seed,
            num_images=run.num_validation_images,
        )

    def shots(self) -> list[Shot]:
        """Return every prompt at every resolution and seed, in the order of the grid's rows."""
        seeds = range(self.seed, self.seed + self.num_images)
        return [
            Shot(prompt, width, height, seed, f"{index:02d}-{slug(prompt)}-{width}x{height}-seed{seed}")
            for (index, prompt), (width, height), seed in product(enumerate(self.prompts), self.resolutions, seeds)
        ]

    def notices(self) -> list[str]:
        """List settings that have no effect."""
        if self.negative_prompt and not guides(self.student.guidance):
            return ["validation_negative_prompt has no effect on the student, which runs without guidance"]
        return []


class Validator:
    """The maker of a plan's images, which it saves and reports.

    The teacher's images are made once and kept under ``validation/teacher/``, each under a name that depends on
    everything that decides it: a resumed run finds them again, one with another teacher, prompt or guidance does not.

    Args:
        family: Encodes prompts and runs the pipeline.
        plan: The images to make.
        output_dir: The run's folder.
    """

    def __init__(self, family: ModelFamily, plan: ValidationPlan, output_dir: Path) -> None:
        self._family, self.plan, self._folder = family, plan, output_dir / FOLDER
        self._shots = plan.shots()
        self._embeds: Conditioning | None = None
        self._negative: Conditioning | None = None

    def prepare(self) -> None:
        """Encode the prompts, which stay in memory; call before the encoders are released."""
        self._embeds = encoded(self._family, self.plan.prompts)
        if self.plan.negative_prompt:
            self._negative = encoded(self._family, [self.plan.negative_prompt], negative=True)

    def folders(self, step: int) -> tuple[str, str]:
        """Return the folders that the images of `step` go to, relative to the run's: the step's own, the teacher's."""
        return f"{FOLDER}/{_step_folder(step)}", f"{FOLDER}/{TEACHER_FOLDER}"

    def _sampling_plans(self) -> tuple[SamplingPlan, SamplingPlan, SamplingPlan]:
        return self.plan.teacher_few, self.plan.student, self.plan.teacher_full

    def run(self, step: int, networks: NetworksByRole, trackers: Trackers, *, writes: bool = True) -> Path:
        """Make the images of `step`; return the folder with each of them and ``grid.png``.

        Args:
            step: Optimizer steps taken.
            networks: Of student and teacher.
            trackers: Get the grid.
            writes: False for processes that only help to compute, since each holds a part of the weights.
        """
        folder = self._folder / _step_folder(step)
        few, student, full = self._sampling_plans()
        missing = {file: (plan, shot) for plan in (few, full) for file, shot in self._teacher_files(plan)}
        missing = {file: each for file, each in missing.items() if not file.is_file()}  # before anything is written
        made = self._make(networks, student, self._shots)
        for plan in (few, full):
            files = {file: shot for file, (of, shot) in missing.items() if of is plan}
            images = self._make(networks, plan, list(files.values()))
            for file, image in zip(files, images, strict=True):
                if writes:
                    save_image(image, file)
        if not writes:
            return folder
        for shot, image in zip(self._shots, made, strict=True):
            save_image(image, folder / f"{shot.name}.png")
        grid = self.grid(step, [self._kept(few), made, self._kept(full)])
        save_image(grid, folder / "grid.png")
        trackers.images(FOLDER, {"grid": grid}, step)
        return folder

    def grid(self, step: int, columns: Sequence[Sequence[Image]]) -> Image:
        """Draw the images of teacher at few steps, student and full teacher, with a row per shot."""
        rows = [
            GridRow(shot.prompt, images, f"{shot.width}x{shot.height}, seed {shot.seed}")
            for shot, *images in zip(self._shots, *columns, strict=True)
        ]
        largest = 256 if len(rows) > MANY_ROWS else 512
        return labelled_grid(
            rows,
            [sampling_plan.label for sampling_plan in self._sampling_plans()],
            title=f"Step {step}",
            largest_cell=largest,
        )

    def _teacher_files(self, sampling_plan: SamplingPlan) -> list[tuple[Path, Shot]]:
        return [(self._teacher_file(sampling_plan, shot), shot) for shot in self._shots]

    def _kept(self, sampling_plan: SamplingPlan) -> list[Image]:
        """Return the teacher's images of every shot, which are on disk."""
        from PIL import Image

        images = []
        for file, _ in self._teacher_files(sampling_plan):
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        return images

    def _teacher_file(self, sampling_plan: SamplingPlan, shot: Shot) -> Path:
        parts = [self._family.fingerprint(part) for part in ("text", "denoiser", "vae")]
        settings = self._family.settings
        decisive = [*parts, settings.weight_dtype, shot.prompt, self.plan.negative_prompt, shot.width, shot.height,
                    shot.seed, sampling_plan.steps, sampling_plan.guidance]  # fmt: skip
        key = blake2b(json.dumps(decisive).encode(), digest_size=4).hexdigest()
        return self._folder / TEACHER_FOLDER / f"{shot.name}-{sampling_plan.steps}steps-{key}.png"

    def _make(self, networks: NetworksByRole, sampling_plan: SamplingPlan, shots: Sequence[Shot]) -> list[Image]:
        """Make images in the order of `shots`; those of one size go through in batches."""
        made: dict[Shot, Image] = {}
        if not shots:
            return []
        if self._embeds is None:
            self.prepare()
        assert self._embeds is not None
        what = (
            f"making {plural(len(shots), 'image')} of the {sampling_plan.name}, {plural(sampling_plan.steps, 'step')}"
        )
        with working(what), sampling(networks, sampling_plan.role) as network:
            for width, height in dict.fromkeys((shot.width, shot.height) for shot in shots):
                alike = [shot for shot in shots if (shot.width, shot.height) == (width, height)]
                batches = make_images(
                    self._family,
                    network,
                    sampling_plan,
                    self._embeds,
                    [self.plan.prompts.index(shot.prompt) for shot in alike],
                    [shot.seed for shot in alike],
                    width=width,
                    height=height,
                    negative=self._negative if guides(sampling_plan.guidance) else None,
                )
                images = [image for batch in batches for image in to_images(batch)]
                made.update(zip(alike, images, strict=True))
        return [made[shot] for shot in shots]


def _step_folder(step: int) -> str:
    return f"step-{step:06d}"


def slug(prompt: str, length: int = 40) -> str:
    """Return the prompt as part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:length].rstrip("-") or "prompt"


def describe(plan: ValidationPlan) -> str:
    """Describe the plan in one line, for the start of a run."""
    student = plan.student
    return (
        f"validation: {plural(len(plan.shots()), 'image')} with {plural(student.steps, 'step')}, "
        f"{describe_guidance(student.guidance)}, beside the teacher at {student.steps} and {plan.teacher_full.steps}"
    )
