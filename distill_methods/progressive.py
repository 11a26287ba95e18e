r"""Progressive distillation: a student does in one step what its teacher does in two, then becomes the teacher.

A stage has a student of N steps from the noisiest time to the data. One training step, t being the start of one of the
N, s its end, and u the point between, which the teacher of 2 N steps visits:

    i ~ U{0 .. N-1},  t -> u -> s  the points 2 i, 2 i + 1, 2 i + 2 of the timestep grid of 2 N steps
    x_t  = alpha_t x_0 + sigma_t eps                                          from data
    x_u, x_s = two DDIM (Euler) steps of the teacher from x_t
    x_0* = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)
    L    = max(alpha_t^2 / sigma_t^2, 1) || x0_theta(x_t, t) - x_0* ||^2

x_0* is what the student must predict for its one step to end where the teacher's two do; on a flow it is the average
velocity. At the end of a stage the student is copied, frozen, and becomes the next teacher: N -> N/2. Its optimizer and
its learning rate begin anew.

The first teacher is the model itself with guidance, so that the first stage also takes the two calls of guidance into
one; later teachers have it built in. A LoRA has no guidance input: a range of w is averaged, which blurs, so w is one
number by default. In full training over a range (w_min < w_max) the student takes w as input in all stages, as in stage
two of Meng et al.: their two stages in one run.

The timestep grid is that of DDIM with trailing spacing and its last step ends at the data, on a table of betas too, as
the sampler's does. x_0 is divided by alpha_t (0.068 at SDXL's last timestep, so an eps network's errors count
14.6-fold there); with zero terminal SNR there is no x_0 of eps, and only v, x_0 and flow predictions are accepted.

References:
    Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
    Meng et al., On Distillation of Guided Diffusion Models, arXiv 2210.03142.
    Lin et al., SDXL-Lightning: Progressive Adversarial Diffusion Distillation (guided first stage), arXiv 2402.13929.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from ..core.diffusion import Prediction, Schedule
from ..core.diffusion.guidance import GuidanceRange, embedded_scale
from ..core.diffusion.regression import SnrWeight, distance, snr_weight
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.solvers import TimestepGrid, data_of_step, deterministic_sampler, step_to, trailing_timesteps
from ..core.errors import UserError
from ..core.plugin_api.batch import Batch, Conditioning
from ..core.plugin_api.context import Context
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from ..core.plugin_api.stage import Stage
from ..core.settings.types import Integers, split_numbers

Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], BeforeValidator(split_numbers)]


class Progressive(Method):
    """Progressive distillation: half the steps per stage, deterministic sampling, 4 to 8 steps without guidance."""

    name = "progressive"
    guidance_keys = ("w_min", "w_max")

    class Config(GuidanceRange):
        """Settings of progressive distillation."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        student_steps: Integers = (32, 16, 8, 4)
        """Sampling steps of each stage's student, each half of the one before; the first teacher uses twice the first.
        The student is validated and exported with the last.
        """
        stage_shares: Shares | None = None
        """Length of each stage in proportion to the others (no unit); absent: equal lengths."""
        w_min: float = Field(6.0, ge=0, le=100)
        """Lower end of the range that the first teacher's guidance is drawn from, in the units of
        guidance_convention."""
        w_max: float = Field(6.0, ge=0, le=100)
        """Upper end of that range. A LoRA averages a range; a fully trained student takes w as an input. A range of 1
        alone (scale) is no guidance, at half the calls of the teacher: for one that has it built in."""
        loss_weight: SnrWeight = "truncated_snr"

        @model_validator(mode="after")
        def _halving(self) -> Progressive.Config:
            steps = self.student_steps
            for before, after in pairwise(steps):
                if 2 * after != before:
                    raise ValueError(
                        f"student_steps = {list(steps)}: {after} is not half of {before}; each stage halves the steps, "
                        f"as {_halved(steps[0])}"
                    )
            if self.stage_shares is not None and len(self.stage_shares) != len(steps):
                raise ValueError(
                    f"stage_shares has {len(self.stage_shares)} numbers for the {len(steps)} stages of student_steps = "
                    f"{list(steps)}: give one for each, or leave it out"
                )
            return self

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        super().__init__(config, setup)
        self._timestep_grids: dict[int, TimestepGrid] = {}

    @classmethod
    def example(cls) -> Mapping[str, Any]:
        """Return settings that reach a student quickly."""
        return {"student_steps": [4, 2], "stage_shares": [1, 3]}

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the base, the student, and the student of the stage before (a frozen adapter or network)."""
        student = Role("student", trains=setup.model_type, guidance_embedding=config.takes_guidance(setup.model_type))
        before = [Role("stage_teacher", copy_of="student")] if len(config.student_steps) > 1 else []
        return [Role("teacher"), student, *before]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require images; a finite x_0 at all times; a guidance input for full training over a range of guidance."""
        if config.scales == (1.0, 1.0):
            setup.require_unguided("distillation_config.progressive: w_min = w_max = 1", "leave both out")
        return Requirements(guidance_embedding=config.takes_guidance(setup.model_type), finite_snr=True)

    @classmethod
    def stages(cls, config: Any, *, total_steps: int) -> Sequence[Stage]:
        """Return a stage for each number of steps; from the second on, the student becomes its own teacher."""
        count = len(config.student_steps)
        lengths = _lengths(config.stage_shares or (1.0,) * count, total_steps)
        if min(lengths) < 1:
            raise UserError(
                f"max_train_steps = {total_steps} leaves a stage of progressive's {count} "
                f"(student_steps = {list(config.student_steps)}) without a step: their lengths would be {lengths}",
                f"train for at least {count} steps, or name fewer student_steps",
            )
        names = [f"{2 * steps} to {steps} steps" for steps in config.student_steps]
        later = {"copy": {"stage_teacher": "student"}, "reset": ("student",), "restart_learning_rate": True}
        first, *rest = zip(names, lengths, strict=True)
        return [Stage(*first), *(Stage(name, length, **later) for name, length in rest)]

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the student's update, one step of algorithm 2 of arXiv 2202.00512."""
        assert batch.latents is not None
        config, rng, x_0 = self.config, context.rng, batch.latents
        num_steps = config.student_steps[context.stage.index]
        timesteps = self._timestep_grid(context, 2 * num_steps)
        point = 2 * rng.integers("index", num_steps)
        t = timesteps.times[point]
        eps = rng.randn("noise", x_0.shape[1:]).to(x_0.dtype)
        x_t = context.schedule.add_noise(x_0, eps, t)
        scale = rng.uniform("w", *config.scales)
        w = scale - 1 if config.takes_guidance(self.setup.model_type) else None

        with torch.no_grad():
            target = self._target(context, timesteps, point, x_t, batch.cond, scale)
        output = context.predict("student", x_t, t, batch.cond, guidance=w).x0

        weight = snr_weight(context.schedule.log_snr(t), config.loss_weight).to(output.dtype)
        losses = weight * distance(output, target, loss_type="l2", huber_c=0.0)
        yield Update("student", losses.mean(), per_sample=losses.detach(), t=t)

    def _target(
        self, context: Context, timesteps: TimestepGrid, point: Tensor, x_t: Tensor, cond: Conditioning, scale: Tensor
    ) -> Tensor:
        """Return x_0* (B, ...) of the teacher's two steps from `x_t` at `point` (B,) of the timestep grid."""
        t, u = timesteps.times[point], timesteps.times[point + 1]
        x_u = step_to(self._teacher(context, x_t, t, cond, scale), timesteps.at(point + 1))
        x_s = step_to(self._teacher(context, x_u, u, cond, scale), timesteps.at(point + 2))
        return data_of_step(x_t, x_s, start=timesteps.at(point), end=timesteps.at(point + 2))

    def _timestep_grid(self, context: Context, num_steps: int) -> TimestepGrid:
        """Return the timestep grid on the device; kept, since a new one would be copied to it at every step."""
        if num_steps not in self._timestep_grids:
            self._timestep_grids[num_steps] = trailing_timesteps(context.schedule, num_steps).to(context.device)
        return self._timestep_grids[num_steps]

    def _teacher(self, context: Context, x: Tensor, t: Tensor, cond: Conditioning, scale: Tensor) -> Prediction:
        """Return the prediction of the guided base in the first stage, of the last stage's student in the others."""
        if context.stage.index > 0:
            w = scale - 1 if self.config.takes_guidance(self.setup.model_type) else None
            return context.predict("stage_teacher", x, t, cond, guidance=w)
        if self.config.scales == (1.0, 1.0):
            return context.predict("teacher", x, t, cond)
        return context.predict_guided(x, t, cond, scale)

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return DDIM with trailing spacing (Euler with sigmas on a flow) at the last stage's steps, guidance off.

        A student that takes w gets the middle of its range unless another scale in the range is asked for.
        """
        steps = self.config.student_steps
        trailing_timesteps(schedule, 2 * steps[0])  # refuses a teacher of more steps than the model has timesteps
        told = self.config.takes_guidance(self.setup.model_type)
        guidance = embedded_scale(guidance_scale, self.config.scales) if told else guidance_scale or 0.0
        return deterministic_sampler(schedule, num_inference_steps or steps[-1], guidance)

    def notices(self) -> list[str]:
        """Return the stages, the guidance in both conventions, and the effect of a range on a LoRA."""
        steps, (low, high) = self.config.student_steps, self.config.scales
        stages = " -> ".join(str(number) for number in (2 * steps[0], *steps))
        scales = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        line = f"progressive: {stages} steps, the first teacher at guidance scale {scales}"
        if not self.config.is_range:
            return [line]
        told = self.config.takes_guidance(self.setup.model_type)
        return [f"{line}, {'which the student takes as an input' if told else 'averaged: a LoRA has no input for it'}"]


def _halved(steps: int) -> list[int]:
    halves = [steps]
    while halves[-1] % 2 == 0 and len(halves) < 6:
        halves.append(halves[-1] // 2)
    return halves


def _lengths(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in these proportions that sum to `total`."""
    ends = [round(total * part / sum(shares)) for part in accumulate(shares)]
    return [end - start for start, end in pairwise([0, *ends[:-1], total])]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [Progressive]
