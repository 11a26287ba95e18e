r"""Progressive distillation: a student does in one step what its teacher does in several, then becomes the teacher.

A stage has a student of N steps from the noisiest time to the data, and a teacher of k N steps, k = 2 as a rule. One
training step, t being the start of one of the N and s its end, which the teacher reaches by way of k - 1 points:

    i ~ U{0 .. N-1},  t = u_0 -> u_1 -> ... -> u_k = s   the points k i .. k (i + 1) of the timestep grid of k N steps
    x_t  = alpha_t x_0 + sigma_t eps                                          from data
    x_s  = k DDIM (Euler) steps of the teacher from x_t
    x_0* = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)
    L    = max(alpha_t^2 / sigma_t^2, 1) || x_0_theta(x_t, t) - x_0* ||^2               or another loss_weight

x_0* is what the student must predict for its one step to end where the teacher's k do; on a flow it is the average
velocity. At the end of a stage the student is copied, frozen, and becomes the next teacher, of N steps. Its optimizer
and its learning rate begin anew.

**Adversarial stages** (SDXL-Lightning). A regression blurs where a step is long. There the student's own end of its
step, x^_s, is held to the teacher's by a discriminator: the first half of a diffusion network E, which begins as the
teacher and is trained, and heads D on its features,

    conditional   l(x_s) = D(E(x_s, s), E(x_t, t))      pairs: this x_s must belong to this x_t, as the teacher's does
    relaxed       l(x_s) = D'(E(x_s, s))                x_s alone: it need not be the one that the teacher makes

    L_D = softplus(-l(x_s)) + softplus(l(x^_s)),        L_G = softplus(-l(x^_s))        non-saturating

The first keeps the teacher's modes, at the price of artefacts where a student of few steps cannot follow them; so the
end of each adversarial stage (``relaxed_share``) is relaxed. The optimizers and E go on from one to the other; D and D'
are heads of their own. Every step takes the student first, then E, then the heads, on the same samples.

What differs from the paper, whose code is not published: a run is that of a LoRA or of all weights, where the paper
merges each stage's LoRA and goes on in full; each network keeps what it predicts, where the paper goes over to x_0 for
one step (an eps network divides its error by alpha, 0.068 at SDXL's last timestep); x_T is noised data, not pure noise;
E goes on from stage to stage.

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
    Lin et al., SDXL-Lightning: Progressive Adversarial Diffusion Distillation, arXiv 2402.13929.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from ..core.diffusion import Prediction, Schedule
from ..core.diffusion.adversarial import HeadKind, HeadLevels
from ..core.diffusion.guidance import GuidanceRange, embedded_scale
from ..core.diffusion.regression import WEIGHTS, distance, error_weight
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.solvers import (
    TimestepGrid,
    data_of_step,
    deterministic_sampler,
    reach_of_step,
    step_to,
    trailing_timesteps,
)
from ..core.diffusion.weights import Number
from ..core.errors import UserError
from ..core.plugin_api.batch import Batch, Conditioning
from ..core.plugin_api.context import Context
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, ModelType, Requirements, Role, Update
from ..core.plugin_api.pair_discriminator import ENCODER, PAIR_HEADS, RELAXED_HEADS, PairDiscriminator, pair_roles
from ..core.plugin_api.stage import Stage, lengths_by_share
from ..core.settings.types import Integers, split_numbers

Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], BeforeValidator(split_numbers)]
PerStage = Annotated[tuple[Number, ...], Field(min_length=1), BeforeValidator(split_numbers)]
END_OF_STEP = "end_of_step"
StepWeight = Annotated[
    Literal["truncated_snr", "snr_plus_one", "v_error", "trained_space", "end_of_step"],
    Field(
        description=f"Weight of the x0 error: {'; '.join(f'{kind}: {words}' for kind, words in WEIGHTS.items())}; "
        "end_of_step: the error of x_s, where the student's step ends, as SDXL-Lightning has it."
    ),
]


@dataclass(frozen=True)
class Phase:
    """A part of the run with one objective.

    Attributes:
        number: Number of the stage in student_steps, from 0.
        relaxed: Whether the discriminator sees the ends of steps alone, not the pairs.
    """

    number: int
    relaxed: bool = False


class Progressive(Method):
    """Progressive distillation: fewer steps per stage, deterministic sampling, 4 to 8 steps; adversarial down to 1."""

    name = "progressive"
    guidance_keys = ("w_min", "w_max")

    class Config(GuidanceRange):
        """Settings of progressive distillation."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        student_steps: Integers = (32, 16, 8, 4)
        """Sampling steps of each stage's student, each dividing the one before, as a rule half of it.
        The student is validated and exported with the last.
        """
        teacher_steps: int | None = Field(None, ge=2, le=1000)
        """Steps of the first teacher, a multiple of the first of student_steps; absent: twice as many."""
        stage_shares: Shares | None = None
        """Length of each stage in proportion to the others (no unit); absent: equal lengths."""
        stage_learning_rates: Shares | None = None
        """Learning rate of each stage; absent: the run's."""
        w_min: float = Field(6.0, ge=0, le=100)
        """Lower end of the range that the first teacher's guidance is drawn from, in the units of
        guidance_convention."""
        w_max: float = Field(6.0, ge=0, le=100)
        """Upper end of that range. A LoRA averages a range; a fully trained student takes w as an input. A range of 1
        alone (scale) is no guidance, at half the calls of the teacher: for one that has it built in."""
        loss_weight: StepWeight = "truncated_snr"
        regression_weight: PerStage = (1.0,)
        """Weight of the squared error, a number or one per stage; 0 where a stage is adversarial alone."""
        adversarial_weight: PerStage = (0.0,)
        """Weight of the adversarial term, a number or one per stage; 0: none in that stage."""
        relaxed_share: float = Field(0.5, ge=0, le=1)
        """Share of each adversarial stage, at its end, in which the discriminator sees ends of steps without their
        starts."""
        discriminator_learning_rate: float | None = Field(None, gt=0, le=1)
        """Learning rate of the discriminator, encoder and heads; null: the run's."""
        discriminator_encoder: ModelType | None = None
        """Kind of the discriminator's encoder: full, all weights of a copy (the paper's, also beside a LoRA), or lora,
        an adapter; null: as the student."""
        heads: HeadKind = "strided"
        head_levels: HeadLevels = "middle"

        @model_validator(mode="after")
        def _fitting(self) -> Progressive.Config:
            problem = _problem(self)
            if problem:
                raise ValueError(problem)
            return self

        @property
        def all_steps(self) -> tuple[int, ...]:
            """Steps of the first teacher, then of each stage's student, who is the next stage's teacher."""
            return (self.teacher_steps or 2 * self.student_steps[0], *self.student_steps)

        @property
        def phases(self) -> tuple[Phase, ...]:
            """The parts of the run: each stage, cut in two where it is adversarial."""
            found: list[Phase] = []
            for number in range(len(self.student_steps)):
                adversarial = _of(self.adversarial_weight, number) > 0
                if not adversarial or self.relaxed_share < 1:
                    found.append(Phase(number))
                if adversarial and self.relaxed_share > 0:
                    found.append(Phase(number, relaxed=True))
            return tuple(found)

        @property
        def judging(self) -> tuple[str, ...]:
            """The roles of heads that are trained at some time."""
            if not any(self.adversarial_weight):
                return ()
            shares = {PAIR_HEADS: 1 - self.relaxed_share, RELAXED_HEADS: self.relaxed_share}
            return tuple(name for name, share in shares.items() if share > 0)

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        super().__init__(config, setup)
        self._timestep_grids: dict[int, TimestepGrid] = {}

    @classmethod
    def example(cls) -> Mapping[str, Any]:
        """Return settings that reach a student quickly."""
        return {"student_steps": [4, 2], "stage_shares": [1, 3]}

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the base, the student, the student of the stage before (a frozen adapter or network), and a
        discriminator.
        """
        student = Role("student", trains=setup.model_type, guidance_embedding=config.takes_guidance(setup.model_type))
        before = [Role("stage_teacher", copy_of="student")] if len(config.student_steps) > 1 else []
        judges = pair_roles(
            config.judging, config.discriminator_encoder or setup.model_type, heads=config.heads,
            head_levels=config.head_levels, learning_rate=config.discriminator_learning_rate,
        )  # fmt: skip
        return [Role("teacher"), student, *before, *judges]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require images; a finite x_0 at all times; a guidance input for full training over a range of guidance;
        features for adversarial stages.
        """
        if config.scales == (1.0, 1.0):
            setup.require_unguided("distillation_config.progressive: w_min = w_max = 1", "leave both out")
        told = config.takes_guidance(setup.model_type)
        if told and config.judging:
            raise UserError(
                f"progressive: adversarial_weight = {list(config.adversarial_weight)} with a range of guidance "
                f"({config.w_min:g} to {config.w_max:g}): the discriminator is not told the scale that the student is",
                "set w_min and w_max to one number",
            )
        return Requirements(guidance_embedding=told, finite_snr=True, features=bool(config.judging))

    @classmethod
    def stages(cls, config: Any, *, total_steps: int) -> Sequence[Stage]:
        """Return a stage for each number of steps, in two where it is adversarial; from the second number on, the
        student becomes its own teacher.
        """
        steps, phases, rates = config.student_steps, config.phases, config.stage_learning_rates
        whole = lengths_by_share(total_steps, config.stage_shares or (1.0,) * len(steps))
        lengths = [_length_of(phase, whole[phase.number], config) for phase in phases]
        if min(lengths) < 1:
            raise UserError(
                f"max_train_steps = {total_steps} leaves a stage of progressive's {len(phases)} "
                f"(student_steps = {list(steps)}) without a step: their lengths would be {lengths}",
                f"train for at least {len(phases)} steps, or name fewer student_steps",
            )
        later = {"copy": {"stage_teacher": "student"}, "restart_learning_rate": True}
        trained = ("student", *((ENCODER, *config.judging) if config.judging else ()))
        found: list[Stage] = []
        for phase, length in zip(phases, lengths, strict=True):
            name = f"{config.all_steps[phase.number]} to {steps[phase.number]} steps"
            begins = phase.number > 0 and not (phase.relaxed and config.relaxed_share < 1)
            name = f"{name}, relaxed" if phase.relaxed else name
            rate = None if rates is None else rates[phase.number]
            more = {**later, "reset": trained} if begins else {}
            found.append(Stage(name, length, learning_rate=rate, **more))
        return found

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the student's update, one step of algorithm 2 of arXiv 2202.00512, and the discriminator's."""
        assert batch.latents is not None
        config, rng, x_0, phase = self.config, context.rng, batch.latents, self._phase(context)
        before, num_steps = config.all_steps[phase.number], config.student_steps[phase.number]
        timesteps, count = self._timestep_grid(context, before), before // num_steps
        point = count * rng.integers("index", num_steps)
        t = timesteps.times[point]
        eps = rng.randn("noise", x_0.shape[1:]).to(x_0.dtype)
        x_t = context.schedule.add_noise(x_0, eps, t)
        scale = rng.uniform("w", *config.scales)
        w = scale - 1 if config.takes_guidance(self.setup.model_type) else None

        with torch.no_grad():
            x_s = self._solve(context, timesteps, point, x_t, batch.cond, scale, count=count)
        prediction = context.predict("student", x_t, t, batch.cond, guidance=w)

        start, end = timesteps.at(point), timesteps.at(point + count)
        target = data_of_step(x_t, x_s, start=start, end=end)
        if config.loss_weight == END_OF_STEP:
            weight = reach_of_step(start=start, end=end) ** 2
        else:
            kind = context.prediction_type
            weight = error_weight(context.schedule, t, kind=config.loss_weight, prediction_type=kind)
        losses = weight.to(target.dtype) * distance(prediction.x0, target, loss_type="l2", huber_c=0.0)
        adversarial_weight = _of(config.adversarial_weight, phase.number)
        if adversarial_weight == 0:
            losses = _of(config.regression_weight, phase.number) * losses
            yield Update("student", losses.mean(), per_sample=losses.detach(), t=t)
            return

        x_hat, s = step_to(prediction, end), timesteps.time_at(point + count)
        judge = PairDiscriminator(context, batch.cond, x_t, t, s, relaxed=phase.relaxed)
        adversarial = judge.generator_loss(x_hat)
        metrics = {"regression": losses.detach().mean(), "adversarial": adversarial.detach().mean()}
        held = _of(config.regression_weight, phase.number)
        losses = adversarial_weight * adversarial + (held * losses if held else 0)
        yield Update("student", losses.mean(), metrics, per_sample=losses.detach(), t=t)
        yield from judge.updates(x_s, x_hat.detach())

    def _phase(self, context: Context) -> Phase:
        """Return the present part; where this method has one part, it serves the stages of other methods."""
        phases = self.config.phases
        return phases[context.stage.index if len(phases) > 1 else 0]

    def _solve(
        self, context: Context, timesteps: TimestepGrid, point: Tensor, x_t: Tensor, cond: Conditioning, scale: Tensor,
        *, count: int,
    ) -> Tensor:  # fmt: skip
        """Return x_s (B, ...), the teacher's `count` steps from `x_t` at `point` (B,) of the timestep grid."""
        x = x_t
        for number in range(count):
            prediction = self._teacher(context, x, timesteps.times[point + number], cond, scale)
            x = step_to(prediction, timesteps.at(point + number + 1))
        return x

    def _timestep_grid(self, context: Context, num_steps: int) -> TimestepGrid:
        """Return the timestep grid on the device; kept, since a new one would be copied to it at every step."""
        if num_steps not in self._timestep_grids:
            self._timestep_grids[num_steps] = trailing_timesteps(context.schedule, num_steps).to(context.device)
        return self._timestep_grids[num_steps]

    def _teacher(self, context: Context, x: Tensor, t: Tensor, cond: Conditioning, scale: Tensor) -> Prediction:
        """Return the prediction of the guided base in the first stage, of the last stage's student in the others."""
        if self._phase(context).number > 0:
            w = scale - 1 if self.config.takes_guidance(self.setup.model_type) else None
            return context.predict("stage_teacher", x, t, cond, guidance=w)
        return context.predict_guided(x, t, cond, scale, guided=self.config.guided)

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return DDIM with trailing spacing (Euler with sigmas on a flow) at the last stage's steps, guidance off.

        A student that takes w gets the middle of its range unless another scale in the range is asked for.
        """
        trailing_timesteps(schedule, self.config.all_steps[0])  # refuses more steps than the model has timesteps
        told = self.config.takes_guidance(self.setup.model_type)
        guidance = embedded_scale(guidance_scale, self.config.scales) if told else guidance_scale or 0.0
        return deterministic_sampler(schedule, num_inference_steps or self.config.student_steps[-1], guidance)

    def notices(self) -> list[str]:
        """Return the stages, the guidance, the effect of a range on a LoRA, and which stages are adversarial."""
        config, (low, high) = self.config, self.config.scales
        stages = " -> ".join(str(number) for number in config.all_steps)
        scales = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        line = f"progressive: {stages} steps, the first teacher at guidance scale {scales}"
        if config.is_range:
            told = config.takes_guidance(self.setup.model_type)
            line += f", {'which the student takes as an input' if told else 'averaged: a LoRA has no input for it'}"
        if not config.judging:
            return [line]
        named = [
            str(steps) for number, steps in enumerate(config.student_steps) if _of(config.adversarial_weight, number)
        ]
        return [
            line,
            f"progressive: the stages that end at {', '.join(named)} steps are adversarial, relaxed for the last "
            f"{config.relaxed_share:.0%} of each",
        ]


def _of(values: Sequence[float], number: int) -> float:
    """Return the value of a stage; a single one is that of every stage."""
    return values[number if len(values) > 1 else 0]


def _problem(config: Progressive.Config) -> str:
    """Return the problem of settings that are valid alone but not together; "" where there is none."""
    steps = list(config.student_steps)
    for before, after in pairwise(config.all_steps):
        if before % after or before == after:
            key = "teacher_steps and student_steps" if before == config.teacher_steps else "student_steps"
            return (
                f"{key} = {[*([before] if before == config.teacher_steps else []), *steps]}: {after} does not divide "
                f"{before}; one step of a stage's student is a whole number of its teacher's, as {_halved(steps[0])}"
            )
    one_each = ("stage_shares", "stage_learning_rates")
    for key in (*one_each, "regression_weight", "adversarial_weight"):
        values = getattr(config, key)
        if values is not None and len(values) != len(steps) and (key in one_each or len(values) > 1):
            return (
                f"{key} has {len(values)} numbers for the {len(steps)} stages of student_steps = {steps}: give one for "
                "each, or leave it out"
            )
    for number, count in enumerate(steps):
        if not _of(config.regression_weight, number) and not _of(config.adversarial_weight, number):
            return f"regression_weight and adversarial_weight are both 0 in the stage of {count} steps"
    return ""


def _halved(steps: int) -> list[int]:
    halves = [steps]
    while halves[-1] % 2 == 0 and len(halves) < 6:
        halves.append(halves[-1] // 2)
    return halves


def _length_of(phase: Phase, whole: int, config: Progressive.Config) -> int:
    """Return the length of a part of a stage of `whole` steps."""
    if _of(config.adversarial_weight, phase.number) == 0:
        return whole
    relaxed = round(config.relaxed_share * whole)
    return relaxed if phase.relaxed else whole - relaxed


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [Progressive]
