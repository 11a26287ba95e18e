r"""Trajectory consistency distillation, with the staged segments of Hyper-SD (TSCD) as an option.

A trajectory consistency function takes a point x_t of the teacher's guided probability-flow ODE to the point at *any*
earlier time s of the same trajectory, where LCM's takes it to the clean end only:

    J_{t -> s}(x_t) = alpha_s x_0^ + sigma_s eps^,      (x_0^, eps^) = the student at (x_t, t);   J_{t -> t}(x) = x

One training step, with a grid of N times t_i = (i + 1) k - 1, k = T // N, and its points p_0 = max(t_0 - k, 0),
p_j = t_{j-1}:

    i ~ U{0 .. N-1},  t = t_i,  t' = p_i
    s = p_j,  j ~ U{e .. i}                                     e = 0, or the lower edge of t's segment
    x_t  = alpha_t x_0 + sigma_t eps                            from data
    x'   = one DDIM step from t to t' of the teacher with guidance g ~ U[w_min, w_max]
    L    = d( J_{t -> s}(x_t; theta), sg J_{t' -> s}(x'; theta-) )        the target is x' itself where s = t'

theta- is the student itself for LoRA, its exponential moving average (0.95) for full training; never the teacher. This
is the first-order function TCF(1) of the paper, the one of the released LoRAs: s is not fed to the network.

**What it converges to.** One prediction per (x_t, t) cannot serve every s exactly. With a = sigma_s / sigma_t and
d_s = alpha_s - a alpha_t, J_{t -> s} = a x_t + d_s x_0^ is linear in the prediction, so at the optimum of the l2 loss

    x_0^(x_t) = sum_s d_s (J_{t' -> s}(x') - a x_t) / sum_s d_s^2

over the s of the segment: the x_0^ that each target asks for, weighted by d_s^2, so that long steps count most. With a
single s per t (segments of one step) it is the teacher's DDIM step exactly.

**Segments** (Hyper-SD, equation 11). ``segments`` [8, 4, 2, 1] cuts the run into stages and the grid into 8, then 4,
2, 1 segments; the targets of a stage do not leave the segment of t. Shorter steps are easier to fit and stay close to
the teacher's trajectory; each stage goes on with the weights of the one before (and with its optimizer's moments,
unless ``reset_optimizer``: the paper speaks of weights alone). Edges are snapped up to the grid, to the points that as
many steps of the sampler visit. The paper weighs the squared error down and an adversarial loss up from stage to stage,
without figures: ``consistency_weight`` and ``adversarial_weight`` take one number per stage. Heads on features of the
frozen teacher tell targets (real) from predictions (fake), both renoised from s to u ~ U[s, s + a segment's length):

    L_D = relu(1 - D(target_u)) + relu(1 + D(prediction_u)),       L_G = relu(1 - D(prediction_u))

The noising and the heads are those of phased consistency models (arXiv 2405.18407); Hyper-SD's reward and score
distillation terms are not part of this method.

**Sampling** (strategic stochastic sampling, algorithm 4 of the paper). From t to the next time t_n: step to
s = (1 - gamma) t_n, then add the noise that leads back up to t_n. gamma (``eta``) 0 is DDIM, 1 is LCM's sampling.

With ``cached_trajectories`` x_t and x' are neighbours on a trajectory of the teacher that was made before training
(:mod:`..core.plugin_api.solver_pairs`), at one guidance scale, and no call of the teacher is left but for features.

The paper trains LoRAs, with the LCM paper's w in [2, 14]; its training code is not published, and this range is from
second sources. Full training follows LCM: the student takes w as an input where it is a range.

References:
    Zheng et al., Trajectory Consistency Distillation, arXiv 2402.19159.
    Ren et al., Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis, arXiv 2404.13686.
    Kim et al., Consistency Trajectory Models, arXiv 2310.02279.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, model_validator

from ..core.diffusion import Schedule
from ..core.diffusion.adversarial import discriminator_loss, generator_loss
from ..core.diffusion.consistency import EmaTarget, has_ema_target, trajectory_function
from ..core.diffusion.guidance import HighestGuidance, LowestGuidance, embedded_scale
from ..core.diffusion.importance import TimestepSampling
from ..core.diffusion.regression import HuberC, LossType, distance
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.segments import (
    GridSteps,
    above_grid,
    check_on_grid,
    even_times,
    renoise,
    segment_edge,
    snapped_edges,
)
from ..core.diffusion.weights import Number, Weight, ever_positive, weight_at
from ..core.errors import UserError
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.discriminator import DiscriminatorSettings
from ..core.plugin_api.grid_draws import DrawsGrid
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from ..core.plugin_api.solver_pairs import SolverSettings, solver_pair
from ..core.plugin_api.stage import Stage

PerStage = Annotated[list[Number], Field(min_length=1)]
DEFAULT_ETA = 0.3
T = TypeVar("T")


class TCD(DrawsGrid):
    """Trajectory consistency: any number of steps, without guidance; in segments that merge by stages (TSCD)."""

    name = "tcd"
    guidance_keys = ("w_min", "w_max")

    class Config(SolverSettings, DiscriminatorSettings):
        """Settings of trajectory consistency distillation."""

        num_ddim_timesteps: GridSteps = 50
        w_min: LowestGuidance = 3.0
        w_max: HighestGuidance = 15.0
        ema_target: EmaTarget = None
        loss_type: LossType = "l2"
        huber_c: HuberC = 0.001
        timestep_sampling: TimestepSampling = "uniform"
        segments: Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(min_length=1)] | None = None
        """Numbers of segments of the grid, one stage of the run each, falling (TSCD: 8, 4, 2, 1); null: no segments."""
        stage_shares: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
        """Length of each stage, relative to the others; null: equal lengths."""
        reset_optimizer: bool = False
        """Whether each stage starts with a fresh optimizer."""
        consistency_weight: Weight | PerStage = 1.0
        """Weight of the consistency loss: a number, {step: number}, or a list with one number per stage."""
        adversarial_weight: Weight | PerStage = 0.0
        """Weight of the adversarial loss: a number, {step: number}, or a list with one number per stage; 0: none."""
        eta: float | None = Field(None, ge=0, le=1)
        """gamma of the sampler: 0 is deterministic, 1 draws all noise anew at each step; null: 0.3, and 0 on a flow."""
        num_inference_steps: int = Field(4, ge=1, le=1000)
        """Steps that the student is validated and exported with unless the run says otherwise."""

        @property
        def stage_segments(self) -> list[int]:
            """Number of segments of each stage; a single stage of one segment where none are named."""
            return self.segments or [1]

        @model_validator(mode="after")
        def _fitting(self) -> TCD.Config:
            problem = _problem(self)
            if problem:
                raise ValueError(problem)
            return self

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        super().__init__(config, setup)
        gamma(config.eta, flow=setup.prediction_type == "flow")  # refused now rather than at the end of the run

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the roles: the student (a full one takes a range of w), its average as target if asked, and heads."""
        takes_guidance = config.takes_guidance(setup.model_type)
        student = Role("student", trains=setup.model_type, guidance_embedding=takes_guidance)
        averaged = has_ema_target(config.ema_target, setup.model_type)
        target = [Role("target", ema_of="student", ema_decay=0.95)] if averaged else []
        roles = [Role("teacher"), student, *target]
        if _ever(config.adversarial_weight):
            roles.append(config.discriminator(betas=(0.0, 0.999), weight_decay=1e-3))
        return roles

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require images or trajectories; equal passes of student and target; features for an adversarial term."""
        guided = config.takes_guidance(setup.model_type)
        return config.requirements(guidance_embedding=guided, features=_ever(config.adversarial_weight))

    @classmethod
    def stages(cls, config: Any, *, total_steps: int) -> Sequence[Stage]:
        """Return one stage for each number of segments."""
        segments = config.stage_segments
        lengths = stage_lengths(total_steps, config.stage_shares or [1.0] * len(segments))
        trained = ("student", "discriminator") if _ever(config.adversarial_weight) else ("student",)
        reset = trained if config.reset_optimizer else ()
        return [
            Stage(f"{number} segment{'s' if number > 1 else ''}", length, reset=reset)
            for number, length in zip(segments, lengths, strict=True)
        ]

    @property
    def _target(self) -> str:
        return "target" if has_ema_target(self.config.ema_target, self.setup.model_type) else "student"

    @property
    def _takes_guidance(self) -> bool:
        return self.config.takes_guidance(self.setup.model_type)

    def result_role(self) -> str:
        """Return the exported role: the average where there is one."""
        return self._target

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the updates of one step of algorithm 1 of arXiv 2402.19159, inside the segments of arXiv 2404.13686."""
        config, schedule, rng = self.config, context.schedule, context.rng
        grid, num_steps = context.grid(config.num_ddim_timesteps), config.num_ddim_timesteps
        num_segments = _of_stage(config.stage_segments, context)
        draw = self.draw_step(context, num_steps)
        i = draw.index
        edge = segment_edge(i, num_steps=num_steps, num_segments=num_segments)
        j = edge + (rng.uniform("target") * (i - edge + 1)).long()
        t, t_prev, s = grid.times[i], grid.previous[i], grid.previous[j]
        scale = rng.uniform("w", *config.scales)
        w = scale - 1 if self._takes_guidance else None
        x_t, x_prev, cond = solver_pair(
            context, batch, i, grid=grid, cached=config.cached_trajectories,
            solve=lambda x, cond: context.predict_guided(x, t, cond, scale, guided=config.guided).ddim_step(t_prev),
        )  # fmt: skip

        with torch.no_grad():
            target = trajectory_function(context.predict(self._target, x_prev, t_prev, cond, guidance=w), s)
        output = trajectory_function(context.predict("student", x_t, t, cond, guidance=w), s)

        losses = distance(output, target, loss_type=config.loss_type, huber_c=config.huber_c)
        metrics = {"consistency": draw.mean(losses.detach())}
        losses = losses * self._weight(config.consistency_weight, context)
        weight = self._weight(config.adversarial_weight, context)
        if weight == 0:
            yield self.student_update(draw, losses, t=t, metrics=metrics)
            return

        reach = -(-num_steps // num_segments)
        u = grid.previous[(j + rng.integers("further", reach)).clamp(max=num_steps - 1)]
        noise = rng.randn("renoise", x_t.shape[1:]).to(x_t.dtype)
        fake, real = (renoise(schedule, x_s, s, u, noise) for x_s in (output, target))
        features = context.features("teacher", fake, u, cond)
        adversarial = generator_loss(context.logits("discriminator", features), kind="hinge")
        losses = losses + weight * adversarial
        metrics["adversarial"] = draw.mean(adversarial.detach())
        yield self.student_update(draw, losses, t=t, metrics=metrics)

        with torch.no_grad():
            told = context.features("teacher", real, u, cond)
        penalty, metrics = config.r1_term(context, told)
        judged = [context.logits("discriminator", seen) for seen in (told, [level.detach() for level in features])]
        losses = discriminator_loss(*judged, kind="hinge") + penalty
        yield Update("discriminator", draw.mean(losses), metrics)

    @staticmethod
    def _weight(weight: float | dict[int, float] | list[float], context: Context) -> float:
        if isinstance(weight, list):
            return _of_stage(weight, context)
        return weight_at(weight, context.step)

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return TCDScheduler on the training grid, guidance off; on a flow, Euler with explicit sigmas.

        A student with a guidance embedding gets the middle of its range instead: 0 or 1 would feed it w <= 0.
        """
        steps, num_grid_steps = num_inference_steps or self.config.num_inference_steps, self.config.num_ddim_timesteps
        self.config.check_grid(self.name, schedule)
        check_on_grid(self.name, steps, num_grid_steps=num_grid_steps)
        guidance = embedded_scale(guidance_scale, self.config.scales) if self._takes_guidance else guidance_scale or 0.0
        eta = gamma(self.config.eta, flow=schedule.clean_at_zero)
        if schedule.clean_at_zero:
            # the grid is shifted already: the scheduler must not do it again
            config = {"shift": 1.0, "use_dynamic_shifting": False, "stochastic_sampling": eta == 1}
            sigmas = even_times(schedule, num_steps=steps, num_grid_steps=num_grid_steps)
            return Sampler("FlowMatchEulerDiscreteScheduler", config, steps, guidance, {"sigmas": sigmas})
        return Sampler("TCDScheduler", {"original_inference_steps": num_grid_steps}, steps, guidance, {"eta": eta})

    def notices(self) -> list[str]:
        """Both conventions of the guidance, and where the edges of the segments lie."""
        num_steps = self.config.num_ddim_timesteps
        snapped = [snapped_edges("segments", number, num_steps=num_steps) for number in self.config.stage_segments]
        return [self.config.notice(self.name), *(f"tcd: {line}" for line in snapped if line)]


def _of_stage(values: Sequence[T], context: Context) -> T:
    """Return the present stage's value; where this method has one stage, that value serves stages of other methods."""
    return values[context.stage.index if len(values) > 1 else 0]


def gamma(eta: float | None, *, flow: bool) -> float:
    """Return gamma of strategic stochastic sampling (arXiv 2402.19159), in [0, 1].

    Args:
        eta: The user's value, or None for the default: 0.3, and 0 on a flow.
        flow: Whether the model is a flow.

    Raises:
        UserError: A value between 0 and 1 on a flow, for which diffusers has no scheduler.
    """
    if eta is None:
        return 0.0 if flow else DEFAULT_ETA
    if flow and 0 < eta < 1:
        raise UserError(
            f"distillation_config.tcd.eta = {eta:g}: no scheduler of diffusers renews part of the noise on a flow",
            "set eta to 0 (deterministic) or 1 (noise anew at each step), or leave it out",
        )
    return eta


def stage_lengths(total_steps: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers in proportion to `shares` that sum to `total_steps`; partial sums are rounded, none drifts.

    Raises:
        UserError: A stage would have no step.
    """
    ends = [round(total_steps * sum(shares[: number + 1]) / sum(shares)) for number in range(len(shares))]
    lengths = [end - start for start, end in pairwise([0, *ends])]
    if min(lengths) < 1:
        raise UserError(
            f"distillation_config.tcd.segments: {total_steps} optimizer steps leave "
            f"stage {lengths.index(min(lengths)) + 1} of {len(shares)} without any",
            "raise max_train_steps, name fewer segments, or change stage_shares",
        )
    return lengths


def _ever(weight: float | dict[int, float] | list[float]) -> bool:
    return any(value > 0 for value in weight) if isinstance(weight, list) else ever_positive(weight)


def _problem(config: TCD.Config) -> str:
    """Return the problem of settings that are valid alone but not together; "" where there is none."""
    segments, num_steps, steps = config.stage_segments, config.num_ddim_timesteps, config.num_inference_steps
    if problem := above_grid(steps, num_grid_steps=num_steps):
        return problem
    if any(later >= earlier for earlier, later in pairwise(segments)):
        return f"segments = {segments} must fall from stage to stage, as [8, 4, 2, 1]"
    if segments[0] > num_steps:
        return (
            f"segments = {segments}: {segments[0]} segments do not fit a grid of num_ddim_timesteps = {num_steps}; "
            "name fewer, or raise num_ddim_timesteps"
        )
    if steps < segments[-1]:
        return (
            f"num_inference_steps = {steps} is below the {segments[-1]} segments of the last stage, which the student "
            "does not learn to skip: raise it, or end segments with a smaller number"
        )
    return _problem_of_stages(config, len(segments))


def _problem_of_stages(config: TCD.Config, num_stages: int) -> str:
    for key in ("stage_shares", "consistency_weight", "adversarial_weight"):
        value = getattr(config, key)
        if isinstance(value, list) and len(value) != num_stages:
            stages = f"{num_stages} stage{'s' if num_stages > 1 else ''}"
            return f"{key} = {value} has {len(value)} numbers for {stages}: give one for each of segments"
    if not _ever(config.consistency_weight) and not _ever(config.adversarial_weight):
        return "consistency_weight and adversarial_weight are both 0: nothing would be trained"
    return ""


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [TCD]
