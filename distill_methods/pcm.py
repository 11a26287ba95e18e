r"""Phased consistency models, full and as a LoRA.

The trajectory of the teacher's probability-flow ODE is cut into M phases, and the student is consistent inside each of
them only: from any point it predicts the end of its own *phase*, not the end of the trajectory. M deterministic steps
from edge to edge then follow one trajectory, with no noise added between them.

One training step, with a grid of N times t_i = (i + 1) k - 1, k = T // N, and its points p_0 = max(t_0 - k, 0),
p_j = t_{j-1}:

    i ~ U{0 .. N-1},  t = t_i,  t' = p_i
    s    = the lower edge of t's phase, the largest of p_{e_m}, e_m = ceil(m N / M), that is not above t'
    x_t  = alpha_t x_0 + sigma_t eps                                from data
    x'   = one DDIM step from t to t' of the teacher with guidance g ~ U[w_min, w_max]
    L    = d( J_{t -> s}(x_t; theta), sg J_{t' -> s}(x'; theta-) )

    J_{t -> s}(x) = alpha_s x_0^ + sigma_s eps^,   (x_0^, eps^) = the network at (x, t)

J meets its boundary by itself: the target is x' exactly where t' is an edge, so nothing crosses into the next phase.
The lowest edge is the first time of a table of betas (alpha_0, as LCM's grid has it) and the clean data on a flow.
theta- is the student itself for LoRA, its exponential moving average (0.95) for full training; never the teacher.

**Its own guidance** (``cfg_free``, section 3.2). A student of a guided solver has w built in; guidance w' on top of it
acts as w w', and negative prompts are diluted. Without guidance in the solver, and with a share of samples trained
without their prompt, the student keeps what its teacher had: a guidance scale and negative prompts at sampling. The
paper does so with four phases or more: fewer leave the student on the poor unguided trajectory for too long.

With ``cached_trajectories`` x_t and x' are neighbours on a trajectory of the teacher that was made before training
(:mod:`..core.plugin_api.solver_pairs`), at one guidance scale, and no call of the teacher is left but for features. The
student's own sampler walks such trajectories too, from edge to edge.

**Adversarial consistency** (section 3.3). Heads D on features of the frozen teacher tell targets (real) from
predictions (fake), both renoised from s to the same u ~ U[s, upper edge of the phase):

    L_D = relu(1 - D(target_u)) + relu(1 + D(prediction_u)),      L_G = relu(1 - D(prediction_u))

and the student minimises L + lambda L_G.

Real is the target, not data: where the student is consistent both distributions are one, and the terms agree. The
authors' code steps the heads and the student in turns, each with forward passes of its own; here every step takes both,
first the student, then the heads, from the same passes. Each moves its own weights only.

The authors' code differs where M does not divide N: their edges are floor(m N / M), which no sampler's even steps
visit; ours are the points that M steps of the sampler visit. Where M divides N both are the same.

References:
    Wang et al., Phased Consistency Models, arXiv 2405.18407.
    Kim et al., Consistency Trajectory Models, arXiv 2310.02279.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.diffusion import Schedule, append_dims
from ..core.diffusion.adversarial import discriminator_loss, generator_loss
from ..core.diffusion.consistency import EmaTarget, has_ema_target, trajectory_function
from ..core.diffusion.guidance import HighestGuidance, LowestGuidance
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
from ..core.diffusion.weights import Weight, ever_positive, weight_at
from ..core.plugin_api.batch import Batch, Conditioning
from ..core.plugin_api.context import Context
from ..core.plugin_api.discriminator import DiscriminatorSettings
from ..core.plugin_api.grid_draws import DrawsGrid
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from ..core.plugin_api.recommended import read_recommended
from ..core.plugin_api.solver_pairs import SolverSettings, solver_pair

EMPTY_PROMPTS = 0.1
"""Share of samples without their prompt where the solver is not guided, as in the authors' code."""
OWN_GUIDANCE = 7.5
"""Guidance scale that students of an unguided solver are sampled with, as in the authors' code."""


class PCM(DrawsGrid):
    """Phased consistency: deterministic steps from edge to edge; keeps guidance and negative prompts if asked."""

    name = "pcm"
    guidance_keys = ("w_min", "w_max")
    recommended = read_recommended(__file__, name)

    class Config(SolverSettings, DiscriminatorSettings):
        """Settings of phased consistency distillation."""

        num_ddim_timesteps: GridSteps = 40
        num_phases: int = Field(4, ge=1, le=1000)
        """M, the number of phases, which is also the student's number of steps; at most N."""
        w_min: LowestGuidance = 7.0
        w_max: HighestGuidance = 8.0
        cfg_free: bool = False
        """Whether the solver runs without guidance (w_min and w_max have no effect), so that the student keeps its own
        guidance scale and negative prompts; for 4 phases or more."""
        empty_prompt_share: float | None = Field(None, ge=0, le=1)
        """Share of samples that are trained without their prompt; null: 0.1 with cfg_free, 0 without."""
        ema_target: EmaTarget = None
        loss_type: LossType = "huber"
        huber_c: HuberC = 0.001
        timestep_sampling: TimestepSampling = "uniform"
        adversarial_weight: Weight = 0.1
        """lambda of the adversarial term, a number or {step: number}; 0: none, and no features are needed."""
        num_inference_steps: int | None = Field(None, ge=1, le=1000)
        """Steps that the student is validated and exported with unless the run says otherwise; null: num_phases."""

        @model_validator(mode="after")
        def _fitting(self) -> PCM.Config:
            phases, num_steps = self.num_phases, self.num_ddim_timesteps
            if phases > num_steps:
                raise ValueError(
                    f"num_phases = {phases} is above num_ddim_timesteps = {num_steps}: a phase needs a step of the "
                    "grid; lower num_phases or raise num_ddim_timesteps"
                )
            if problem := above_grid(self.default_steps, num_grid_steps=num_steps):
                raise ValueError(problem)
            if self.cached_trajectories and (self.cfg_free or self.share_without_prompt > 0):
                key = "cfg_free" if self.cfg_free else "empty_prompt_share"
                raise ValueError(
                    f"{key} needs the teacher without its prompt, and cached_trajectories are those of prompts at one "
                    f"guidance scale: leave out {key}, or cached_trajectories"
                )
            return self

        @property
        def default_steps(self) -> int:
            """The sampler's number of steps where none is asked for."""
            return self.num_inference_steps or self.num_phases

        @property
        def share_without_prompt(self) -> float:
            """Share of samples that are trained without their prompt."""
            if self.empty_prompt_share is not None:
                return self.empty_prompt_share
            return EMPTY_PROMPTS if self.cfg_free else 0.0

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the roles: the student, its average as target if asked, heads if adversarial."""
        student = Role("student", trains=setup.model_type)
        averaged = has_ema_target(config.ema_target, setup.model_type)
        target = [Role("target", ema_of="student", ema_decay=0.95)] if averaged else []
        roles = [Role("teacher"), student, *target]
        if ever_positive(config.adversarial_weight):
            roles.append(config.discriminator(betas=(0.0, 0.999), weight_decay=1e-3))
        return roles

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require images or trajectories; equal passes of student and target; features for an adversarial term."""
        if config.cfg_free:
            setup.require_unguided("distillation_config.pcm.cfg_free", "set it to false")
        return config.requirements(features=ever_positive(config.adversarial_weight))

    @property
    def _target(self) -> str:
        return "target" if has_ema_target(self.config.ema_target, self.setup.model_type) else "student"

    def result_role(self) -> str:
        """Return the exported role: the average where there is one."""
        return self._target

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the updates of one step of algorithm 1 of arXiv 2405.18407, with the terms of its equation 9."""
        config, schedule, rng = self.config, context.schedule, context.rng
        grid = context.grid(config.num_ddim_timesteps)
        draw = self.draw_step(context, len(grid))
        i = draw.index
        lower, upper = phase_of(i, num_steps=len(grid), num_phases=config.num_phases)
        t, t_prev, s = grid.times[i], grid.previous[i], grid.previous[lower]
        x_t, x_prev, cond = solver_pair(
            context, batch, i, grid=grid, cached=config.cached_trajectories,
            prompts=lambda cond: self._prompts(context, cond),
            solve=lambda x, cond: self._solve(context, x, t, t_prev, cond),
        )  # fmt: skip

        with torch.no_grad():
            target = trajectory_function(context.predict(self._target, x_prev, t_prev, cond), s)
        output = trajectory_function(context.predict("student", x_t, t, cond), s)

        losses = distance(output, target, loss_type=config.loss_type, huber_c=config.huber_c)
        weight = weight_at(config.adversarial_weight, step)
        if weight == 0:
            yield self.student_update(draw, losses, t=t)
            return

        # truncated to a whole timestep where the schedule counts them
        u = (s + rng.uniform("further") * (grid.times[upper] - s)).to(s.dtype)
        real, fake = (
            renoise(schedule, x_s, s, u, rng.randn(f"further/{name}", x_t.shape[1:]).to(x_t.dtype))
            for name, x_s in (("real", target), ("fake", output))
        )
        features = context.features("teacher", fake, u, cond)
        adversarial = generator_loss(context.logits("discriminator", features), kind="hinge")
        metrics = {"consistency": draw.mean(losses.detach()), "adversarial": draw.mean(adversarial.detach())}
        losses = losses + weight * adversarial
        yield self.student_update(draw, losses, t=t, metrics=metrics)

        with torch.no_grad():
            told = context.features("teacher", real, u, cond)
        penalty, metrics = config.r1_term(context, told)
        judged = [context.logits("discriminator", seen) for seen in (told, [level.detach() for level in features])]
        losses = discriminator_loss(*judged, kind="hinge") + penalty
        yield Update("discriminator", draw.mean(losses), metrics)

    def _solve(self, context: Context, x_t: Tensor, t: Tensor, t_prev: Tensor, cond: Conditioning) -> Tensor:
        """Return x' (B, ...), one step of the teacher's solver from `t` to `t_prev`."""
        if self.config.cfg_free:
            return context.predict("teacher", x_t, t, cond).ddim_step(t_prev)
        scale = context.rng.uniform("w", *self.config.scales)
        return context.predict_guided(x_t, t, cond, scale, guided=self.config.guided).ddim_step(t_prev)

    def _prompts(self, context: Context, cond: Conditioning) -> Conditioning:
        """Return `cond` with a share of the samples unconditional."""
        share = self.config.share_without_prompt
        if share == 0:
            return cond
        empty, uncond = context.rng.uniform("empty") < share, context.uncond(cond)
        return {
            name: torch.where(append_dims(empty, value).bool(), uncond[name], value) for name, value in cond.items()
        }

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return DDIM on the training grid, from phase edge to phase edge; Euler with explicit sigmas on a flow.

        TCDScheduler at eta = 0 is DDIM that ends at the first time of the table, on the grid that it is given. Guidance
        is as asked; by default off, and 7.5 with ``cfg_free``.
        """
        steps, num_grid_steps = num_inference_steps or self.config.default_steps, self.config.num_ddim_timesteps
        self.config.check_grid(self.name, schedule)
        check_on_grid(self.name, steps, num_grid_steps=num_grid_steps)
        default = OWN_GUIDANCE if self.config.cfg_free else 0.0
        guidance = default if guidance_scale is None else guidance_scale
        visited = sampling_steps(steps, num_steps=num_grid_steps, num_phases=self.config.num_phases)
        times = [float(schedule.grid(num_grid_steps).times[index]) for index in visited]
        if schedule.clean_at_zero:
            # the grid is shifted already: the scheduler must not do it again
            config = {"shift": 1.0, "use_dynamic_shifting": False}
            return Sampler("FlowMatchEulerDiscreteScheduler", config, steps, guidance, {"sigmas": times})
        call: dict[str, Any] = {"eta": 0.0}
        if times != even_times(schedule, num_steps=steps, num_grid_steps=num_grid_steps):
            call["timesteps"] = [int(time) for time in times]
        return Sampler("TCDScheduler", {"original_inference_steps": num_grid_steps}, steps, guidance, call)

    def notices(self) -> list[str]:
        """Return the solver's guidance, and where the phases begin if they are uneven."""
        config = self.config
        phases, lines = config.num_phases, [config.notice(self.name)]
        if config.cfg_free:
            share = config.share_without_prompt
            lines = [
                f"pcm: the teacher's solver runs without guidance and {share:.0%} of the samples without their prompt; "
                f"sample the student with guidance (default {OWN_GUIDANCE:g})"
            ]
            if phases < 4:
                lines.append(f"pcm: cfg_free with num_phases = {phases}: the paper has found 4 or more to be needed")
        if snapped := snapped_edges("phases", phases, num_steps=config.num_ddim_timesteps):
            lines.append(f"pcm: {snapped}")
        return lines


def phase_of(index: Tensor, *, num_steps: int, num_phases: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last step of each step's phase, each of shape (B,) (arXiv 2405.18407).

    The phase ends (clean side) where its first step ends and begins (noisy side) where its last step begins.

    Args:
        index: Steps i of the grid in 0 .. N-1, shape (B,).
        num_steps: N.
        num_phases: M.
    """
    following = index * num_phases // num_steps + 1
    lower = segment_edge(index, num_steps=num_steps, num_segments=num_phases)
    return lower, (following * num_steps + num_phases - 1) // num_phases - 1


def sampling_steps(count: int, *, num_steps: int, num_phases: int) -> list[int]:
    """Return the steps of the grid that `count` sampling steps begin with, falling; they visit every edge if they can.

    Each phase gets one, the widest ones get what is left, and inside a phase they are even. Fewer steps than phases
    are spread evenly over the grid, and cross edges.
    """
    if count < num_phases:
        return [num_steps - 1 - j * num_steps // count for j in range(count)]
    edges = [-(-m * num_steps // num_phases) for m in range(num_phases + 1)]
    widths = [upper - lower for lower, upper in pairwise(edges)]
    shares = [1] * num_phases
    for _ in range(count - num_phases):
        widest = max(range(num_phases), key=lambda m: (widths[m] / shares[m], m))
        shares[widest] += 1
    return [
        edges[m + 1] - 1 - j * widths[m] // shares[m] for m in reversed(range(num_phases)) for j in range(shares[m])
    ]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [PCM]
