r"""Several methods at once, composed from the configuration alone.

A recipe is a list of terms, each a registered method with its own settings and a weight that may change by step and by
stage. At optimizer step n, with L_k the student's loss of term k,

    L = sum_k  w_k(n) L_k          over the terms whose weight is above 0 and that step the student at n

is one update of the student. A term whose weight is 0 at n is not computed at all, its other networks included. Updates
that a term yields for its other networks (a fake score, heads) pass through unscaled: a weight sets how much a term
counts for the student, not how well the term's own networks are trained. A term that steps the student every fifth time
contributes at those steps.

Consistency beside distribution matching (rCM) and distribution matching held by a regression on the teacher's
trajectories (the first DMD) are recipes of this kind.

**Stages.** ``stages`` cuts the run into parts with a name, a length and, where it changes, a learning rate; the terms'
``stage_weights`` say which of them count in which. DMD2's set-up for one step, in one file: regression on the teacher's
trajectories, then distribution matching. A term of weight 0 in a stage is not computed there. Its networks are made
when the run begins (moments of their optimizers only when they are first stepped), and its data is read throughout.

Roles of one name are one network. So the terms must declare them alike, and at most one term at a time may train a role
other than the student: alternating two losses on one fake score would fit neither. Terms draw the same noise where they
name it alike (common random numbers), so a recipe of one term with weight 1 is that method, bit for bit. The graphs of
all terms of a step are in memory at once.

References:
    Zheng et al., Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency (rCM),
        arXiv 2510.08431.
    Yin et al., One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828.
    Yin et al., Improved Distribution Matching Distillation (warm-up for one step), arXiv 2405.14867.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from ..core.diffusion import Schedule
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.weights import Number, Weight, ever_positive, weight_at
from ..core.errors import UserError
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodPart, MethodSetup, Requirements, Role, Update
from ..core.plugin_api.stage import Stage, StageSettings, stages_of_settings
from ..core.utils.suggest import did_you_mean, nearest

STUDENT = "student"


class Term(MethodPart):
    """A method, its settings, and the weight of its student's loss."""

    weight: Weight = 1.0
    """A number, or {step: number}: linear between the steps named, constant before the first and after the last."""
    stage_weights: dict[str, Number] = Field(default_factory=dict)
    """Name of a stage -> factor of the weight during it; 1 for stages that are not named."""

    @property
    def used(self) -> bool:
        """True if the term has a weight above 0 at some step."""
        return ever_positive(self.weight)

    def weight_at(self, step: int, stage: str) -> float:
        """Return the weight at an optimizer step of a stage."""
        return weight_at(self.weight, step) * self.stage_weights.get(stage, 1.0)


def labels_of(terms: Sequence[Term]) -> list[str]:
    """Return the terms' labels: the name of the method, with -2, -3, ... for further terms of the same method."""
    names = [term.method for term in terms]
    counts = [names[:index].count(name) + 1 for index, name in enumerate(names)]
    return [name if count == 1 else f"{name}-{count}" for name, count in zip(names, counts, strict=True)]


class Recipe(Method):
    """Several methods with weights that change by step or stage, trained as one."""

    name = "recipe"

    class Config(BaseModel):
        """Settings of a recipe."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        terms: list[Term] = Field(min_length=1)
        """Each {"method": NAME, "weight": 1.0, "stage_weights": {}, "config": {settings of that method}}; a weight is a
        number, or {"0": 0, "500": 0.25}, linear in between."""
        stages: list[StageSettings] | None = Field(None, min_length=1)
        """Parts of the run, each {"name": NAME, "steps": 2000, "share": 1, "learning_rate": 1e-5, "reset_optimizer":
        false} with a length in steps or a share of the rest; absent: those of a term that has some, else one."""
        sampler: str | None = Field(None, validate_default=True)
        """The term whose sampler the student is validated and exported with; absent: the first of the last stage."""

        @field_validator("terms", mode="after")
        @classmethod
        def _something_weighs(cls, terms: list[Term]) -> list[Term]:
            if not any(term.used for term in terms):
                raise ValueError("has no term with a weight above 0: there is nothing to train")
            return terms

        @field_validator("stages", mode="after")
        @classmethod
        def _names_differ(cls, stages: list[StageSettings] | None) -> list[StageSettings] | None:
            names = [stage.name for stage in stages or ()]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"has more than one stage named {', '.join(twice)}: give each its own name")
            return stages

        @field_validator("sampler", mode="after")
        @classmethod
        def _is_a_term(cls, sampler: str | None, info: ValidationInfo) -> str | None:
            terms: Sequence[Term] = info.data.get("terms", ())
            used = [label for label, term in zip(labels_of(terms), terms, strict=True) if term.used]
            if sampler is not None and terms and sampler not in used:
                close = nearest(sampler, used)
                hint = f" (did you mean {close!r}?)" if close else ""
                raise ValueError(f"is none of the terms that are used: {', '.join(used)}{hint}")
            return sampler

        @property
        def used(self) -> dict[str, Term]:
            """The terms with a weight above 0 at some step, by label."""
            return {
                label: term
                for label, term in zip(labels_of(self.terms), self.terms, strict=True)
                if term.used and self.stages_of(term)
            }

        def stages_of(self, term: Term) -> set[str | None]:
            """Return the names of the stages in which a term counts; of a recipe without stages, None alone."""
            if self.stages is None:
                return {None}
            return {stage.name for stage in self.stages if term.stage_weights.get(stage.name, 1.0) > 0}

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        super().__init__(config, setup)
        self._terms = [ActiveTerm(label, term, term.found(term.settings, setup)) for label, term in config.used.items()]

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the roles of all terms; roles of one name are one network."""
        owners: dict[str, list[tuple[str, Role]]] = {}
        for label, term in config.used.items():
            for role in term.found.roles(term.settings, setup):
                for owner, declared in owners.setdefault(role.name, []):
                    shared = config.stages_of(config.used[owner]) & config.stages_of(term)
                    _require_alike(owner, declared, label, role, at_once=bool(shared))
                owners[role.name].append((label, role))
        return [declared[0][1] for declared in owners.values()]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """All that any of its terms needs."""
        return Requirements.union(term.found.requires(term.settings, setup) for term in config.used.values())

    @classmethod
    def stages(cls, config: Any, *, total_steps: int) -> Sequence[Stage]:
        """Return the recipe's own stages, or those of the one term that has several, or none."""
        found = {
            label: term.found.stages(term.settings, total_steps=total_steps) for label, term in config.used.items()
        }
        staged = [label for label, stages in found.items() if len(stages) > 1]
        if len(staged) > 1:
            raise UserError(
                f"the terms {' and '.join(staged)} of the recipe have stages of their own; one term may",
                f"leave {' or '.join(staged)} out, or set it to a single stage",
            )
        if staged and config.stages:
            raise UserError(
                f"the recipe has stages, and its term {staged[0]} has stages of its own "
                f"({', '.join(stage.name for stage in found[staged[0]])})",
                f"set {staged[0]} to a single stage, leave the recipe's stages out, or train one run after the other "
                "(init_lora)",
            )
        stages = found[staged[0]] if staged else super().stages(config, total_steps=total_steps)
        if config.stages:
            stages = stages_of_settings(config.stages, total_steps)
        _check_weights(config.used, stages)
        return stages

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the other roles' updates of each term, and one update of the student with the sum of the losses.

        A term waits at its student's loss until the others have come to theirs, so that every loss of the sum belongs
        to the same weights.
        """
        stage = context.stage.name
        active = [(term, term.config.weight_at(step, stage)) for term in self._terms]
        running = [(term, weight, term.method.updates(context, batch, step)) for term, weight in active if weight > 0]
        while running:
            weighteds: list[WeightedUpdate] = []
            waiting = []
            for term, weight, generator in running:
                for update in generator:
                    if update.role == STUDENT:
                        weighteds.append(WeightedUpdate(term.label, weight, update))
                        waiting.append((term, weight, generator))
                        break
                    yield replace(update, metrics=_prefixed(term.label, update.metrics))
            if weighteds:
                yield joint(weighteds)
            running = waiting

    @property
    def _sampled(self) -> Method:
        """The method whose sampler and result the recipe uses."""
        by_label = {term.label: term.method for term in self._terms}
        if self.config.sampler:
            return by_label[self.config.sampler]
        last = self.config.stages[-1].name if self.config.stages else None
        return next(term.method for term in self._terms if last in self.config.stages_of(term.config))

    def result_role(self) -> str:
        """Return the role that the term of the sampler exports."""
        return self._sampled.result_role()

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return the sampler of the term named by ``sampler``, or of the first term of the last stage."""
        return self._sampled.sampler(schedule, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    def notices(self) -> list[str]:
        """Return the weights and the stages, then each term's notices."""
        weights = "; ".join(f"{term.label} {_spoken(term.config)}" for term in self._terms)
        lines = [f"recipe: {weights}"]
        for stage in self.config.stages or ():
            counting = (term.label for term in self._terms if stage.name in self.config.stages_of(term.config))
            lines.append(f"recipe: stage {_spoken_stage(stage)}: {', '.join(counting)}")
        return [*lines, *(line for term in self._terms for line in term.method.notices())]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the terms' states."""
        states = {term.label: term.method.state_dict() for term in self._terms}
        return {f"{label}/{key}": value for label, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give each term its own state."""
        for term in self._terms:
            prefix = f"{term.label}/"
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            term.method.load_state_dict(own)


@dataclass(frozen=True)
class ActiveTerm:
    """A term that is used: its label, its settings in the recipe, and its method."""

    label: str
    config: Term
    method: Method


@dataclass(frozen=True)
class WeightedUpdate:
    """A term's update of the student at one step, and its weight."""

    label: str
    weight: float
    update: Update


def joint(weighteds: Sequence[WeightedUpdate]) -> Update:
    """Return one update of the student: the weighted sum of the terms' losses.

    Losses of single samples add up where every term gives them. Times are kept where one term alone contributes: terms
    draw their own, and a sum of losses has none.
    """
    loss = torch.stack([weighted.weight * weighted.update.loss for weighted in weighteds]).sum()
    metrics: dict[str, Tensor] = {}
    for weighted in weighteds:
        own = {
            "loss": weighted.update.loss.detach(),
            "weight": torch.full_like(weighted.update.loss.detach(), weighted.weight),
        }
        metrics |= _prefixed(weighted.label, {**own, **weighted.update.metrics})
    each = [weighted.weight * sample for weighted in weighteds if (sample := weighted.update.per_sample) is not None]
    return Update(
        STUDENT,
        loss,
        metrics=metrics,
        per_sample=torch.stack(each).sum(0) if len(each) == len(weighteds) else None,
        t=weighteds[0].update.t if len(weighteds) == 1 else None,
        seen=[seen for weighted in weighteds for seen in weighted.update.seen],
    )


def _prefixed(label: str, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{label}/{name}": value for name, value in metrics.items()}


def _require_alike(owner: str, declared: Role, label: str, role: Role, *, at_once: bool) -> None:
    """Refuse two terms that cannot share a network; they may both train one if they never count `at_once`."""
    for field in fields(Role):
        ours, theirs = getattr(declared, field.name), getattr(role, field.name)
        if ours != theirs:
            raise UserError(
                f"the terms {owner} and {label} cannot share the network {role.name!r}: {field.name} is {ours!r} for "
                f"{owner} and {theirs!r} for {label}",
                "change the settings or the model_type that make them differ, or leave one of the two terms out",
            )
    if at_once and role.trains != "none" and role.name != STUDENT:
        raise UserError(
            f"the terms {owner} and {label} would both train {role.name!r}, each with its own loss",
            f"leave one of the two out, or the part of it that trains {role.name!r}",
        )


def _check_weights(terms: Mapping[str, Term], stages: Sequence[Stage]) -> None:
    """Check that every stage named by a weight exists, and that some weight is above 0 at every step."""
    names = [stage.name for stage in stages]
    for label, term in terms.items():
        for name in term.stage_weights:
            if name not in names:
                raise UserError(
                    f"stage_weights of the term {label} names {name!r}, which is no stage of this run",
                    f"{did_you_mean(name, names)}stages: {', '.join(names)}",
                )
    start = 0
    for stage in stages:
        for step in _turning_points(terms, start, start + stage.num_steps):
            if not any(term.weight_at(step, stage.name) > 0 for term in terms.values()):
                raise UserError(
                    f"no term of the recipe has a weight above 0 at step {step}, in stage {stage.name!r}",
                    "give a term a weight above 0 there",
                )
        start += stage.num_steps


def _turning_points(terms: Mapping[str, Term], start: int, end: int) -> list[int]:
    """Return the steps of [start, end) between which weights are linear: a sum of them vanishes at one or nowhere."""
    named = {step for term in terms.values() if isinstance(term.weight, dict) for step in term.weight}
    return sorted({start, end - 1, *(step for step in named if start <= step < end)})


def _spoken_stage(stage: StageSettings) -> str:
    length = f"{stage.steps} steps" if stage.steps else f"share {stage.share or 1:g}"
    rate = "" if stage.learning_rate is None else f", learning rate {stage.learning_rate:g}"
    return f"{stage.name} ({length}{rate})"


def _spoken(term: Term) -> str:
    if not isinstance(term.weight, dict):
        words = f"weighs {term.weight:g}"
    else:
        words = "weighs " + ", ".join(f"{term.weight[step]:g} at step {step}" for step in sorted(term.weight))
    factors = ", ".join(f"x {factor:g} in stage {name}" for name, factor in term.stage_weights.items())
    return f"{words} ({factors})" if factors else words


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [Recipe]
