"""The plan of an evaluation: which networks, at how many steps, with which schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Self

from .sampling import SamplingPlan, teacher_plan

if TYPE_CHECKING:
    from ..diffusion.sampler import Sampler
    from ..plugin_api.family import ModelFamily


@dataclass(frozen=True)
class SampleSet:
    """The prompts and noise that images are made of. Sample i has prompt i (cycled) and seed ``seed + i`` for every
    network.

    Attributes:
        prompts: At least one.
        num_samples: Images of each sampling plan.
        seed: Seed of the first sample.
        width: Pixels.
        height: Pixels.
    """

    prompts: tuple[str, ...]
    num_samples: int
    seed: int
    width: int
    height: int

    @property
    def sample_prompts(self) -> list[str]:
        """The prompt of each sample."""
        return [self.prompts[index] for index in self.prompt_indices]

    @property
    def prompt_indices(self) -> list[int]:
        """The index into the prompts of each sample."""
        return [index % len(self.prompts) for index in range(self.num_samples)]

    @property
    def seeds(self) -> list[int]:
        """The seed of each sample."""
        return list(range(self.seed, self.seed + self.num_samples))

    def first(self, count: int) -> Self:
        """Return the first `count` samples alone."""
        return replace(self, num_samples=count)

    def identity(self, *, num_data: int) -> dict[str, Any]:
        """Return what scores of two sets must have in common to be compared, as JSON values.

        Args:
            num_data: Real images that distances are measured to.
        """
        prompts = blake2b("\x1f".join(self.sample_prompts).encode(), digest_size=8).hexdigest()
        return {
            "num_samples": self.num_samples,
            "num_data": num_data,
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "prompts": prompts,
        }


@dataclass(frozen=True)
class EvaluationPlan(SampleSet):
    """The images to be made and scored.

    Attributes:
        sampling_plans: The networks and steps that are scored, the full teacher among them.
        reference: The full teacher.
    """

    sampling_plans: tuple[SamplingPlan, ...]
    reference: SamplingPlan


def plan_evaluation(
    family: ModelFamily,
    sampler_for: Callable[[int], Sampler],
    *,
    prompts: Sequence[str],
    num_samples: int,
    seed: int,
    resolution: tuple[int, int],
    steps: Sequence[int] = (1, 2, 4, 8),
    teacher_steps: Sequence[int] = (4, 50),
    teacher_guidance: float | None = None,
    role: str = "student",
) -> EvaluationPlan:
    """Plan the teacher at few steps, a fast solver beside it, the student at each number of steps, and the full
    teacher.

    All of the teacher's sampling plans but the fast solver use one scheduler, and all of them one guidance.

    Args:
        family: Gives the teacher's usual guidance and the fast solver's settings.
        sampler_for: Makes the method's sampler for a number of steps.
        prompts: At least one.
        num_samples: Images of each sampling plan.
        seed: Seed of the first sample.
        resolution: (width, height) in pixels.
        steps: Numbers of steps of the student.
        teacher_steps: Numbers of steps of the teacher; the largest is the reference, the fast solver has the smallest.
        teacher_guidance: Guidance scale; None for the family's usual one.
        role: The student's role.
    """
    counts = sorted(set(teacher_steps))
    teachers = [teacher_plan(family, count, teacher_guidance) for count in counts]
    solver = fast_solver(family, counts[0], teachers[0].guidance)
    samplers = [(count, sampler_for(count)) for count in sorted(set(steps))]
    students = [SamplingPlan("student", role, sampler, count, sampler.guidance_scale) for count, sampler in samplers]
    sampling_plans = (*teachers[:-1], solver, *students, teachers[-1])
    return EvaluationPlan(tuple(prompts), num_samples, seed, *resolution, sampling_plans, teachers[-1])


def fast_solver(family: ModelFamily, steps: int, guidance: float) -> SamplingPlan:
    """Plan DPM-Solver++ 2M, the teacher's best at few steps without any training (arXiv 2211.01095)."""
    from ..diffusion.sampler import Sampler

    config: dict[str, object] = {"algorithm_type": "dpmsolver++", "solver_order": 2}
    if family.prediction_type == "flow":
        shift = getattr(family.schedule, "shift", 1.0)
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    else:
        # begins at the last timestep: "leading" starts few-step images from what is not noise enough
        config |= {"timestep_spacing": "trailing"}
    sampler = Sampler("DPMSolverMultistepScheduler", config, steps, guidance)
    return SamplingPlan("teacher, DPM++ 2M", "teacher", sampler, steps, guidance, optional=True)
