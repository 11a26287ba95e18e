"""The training loop: it owns zero_grad, backward, clipping, stepping and averages, and knows no method by name.

Under accumulation the micro-batches' generators advance in lockstep: all yield their first update, the role is stepped,
all yield the second; so 1x4 equals 4x1 also for methods with alternate updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..diffusion.importance import LossHistory, SeenLosses, sums_by_bin
from ..errors import PluginError
from ..plugin_api.batch import Batch
from ..plugin_api.context import Context
from ..plugin_api.method import Method, Update
from ..plugin_api.stage import Stage
from ..utils.spans import AVERAGES, BACKWARD, OPTIMIZER, REDUCTION, span
from .health import HealthMonitor
from .networks import Networks
from .optimize import RoleOptimizer
from .returned import wrong

NUM_TIME_BINS = 10
YIELD = 'Write `yield Update("student", loss)` for each network that is to be stepped.'
Reduce = Callable[[Sequence[Tensor]], None]


def no_reduction(tensors: Sequence[Tensor]) -> None:
    """Do nothing: with one process there is nothing to average."""


def no_wait() -> None:
    """Do nothing: nobody reads the weights."""


@dataclass
class StepResult:
    """Results of one optimizer step, still on the device."""

    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    bin_sums: Tensor | None = None
    """Sum of per-sample losses by timestep bin, shape (10,)."""
    bin_counts: Tensor | None = None
    """Number of samples by timestep bin, shape (10,)."""


def stage_starts(stages: Sequence[Stage]) -> dict[int, Stage]:
    """Return the first optimizer step of every stage but the first."""
    starts, step = {}, 0
    for stage in stages:
        if step:
            starts[step] = stage
        step += stage.num_steps
    return starts


@dataclass
class _Accumulated:
    """The updates of one role from every micro-batch of a step."""

    role: str
    updates: list[Update] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


class Loop:
    """Takes optimizer steps.

    Args:
        method: Yields the updates.
        context: The run's context; bound to each micro-batch here.
        networks: Networks by role.
        optimizers: Optimizers by trained role.
        health: Records each step's flags.
        reduce: Averages tensors over processes, in place.
        stages: The method's stages, in order; their resets and copies happen before their first step.
    """

    def __init__(
        self,
        method: Method,
        context: Context,
        networks: Networks,
        optimizers: Mapping[str, RoleOptimizer],
        *,
        health: HealthMonitor,
        reduce: Reduce = no_reduction,
        stages: Sequence[Stage] = (),
    ) -> None:
        self.method, self.context, self.networks = method, context, networks
        self.optimizers, self.health, self._reduce = optimizers, health, reduce
        self.stage_starts = stage_starts(stages)
        self.before_change: Callable[[], None] = no_wait
        """Called before weights, moments or averages change: somebody may still be copying them."""

    def step(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Take optimizer step `step` over this process's micro-batches."""
        self.health.check()
        if step in self.stage_starts:
            self._enter(self.stage_starts[step])
        contexts = [self.context.at(step, batch.positions) for batch in batches]
        generators = [self._updates(context, batch, step) for context, batch in zip(contexts, batches, strict=True)]
        result = StepResult()
        while True:
            accumulated: _Accumulated | None = None
            for generator, batch in zip(generators, batches, strict=True):
                update = next(generator, None)
                if update is not None:
                    self._check(update)
                    accumulated = accumulated or _Accumulated(update.role)
                    self._accumulate(accumulated, update, batch, len(batches))
            if accumulated is None:
                return result
            assert len(accumulated.updates) == len(batches), "micro-batches must yield the same updates"
            self._take(step, accumulated, result)

    def _updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        found = self.method.updates(context, batch, step)
        if not isinstance(found, Iterator):
            raise self._wrong(f"returned {type(found).__name__}, not an iterator of updates")
        return found

    def _check(self, update: object) -> None:
        if not isinstance(update, Update):
            raise self._wrong(f"yielded {type(update).__name__}, not an Update")
        if update.role not in self.optimizers:
            trained = ", ".join(map(repr, self.optimizers))
            raise self._wrong(f"yielded an update of {update.role!r}; the roles that its roles() train are {trained}")
        if not isinstance(update.loss, Tensor):
            raise self._wrong(f"yielded a loss of {update.role!r} that is {type(update.loss).__name__}, not a tensor")
        if not update.loss.requires_grad:
            remedy = f'Is it detached, or was `context.predict("{update.role}", ...)` called under `torch.no_grad()`?'
            raise self._wrong(f"yielded a loss of {update.role!r} without a gradient", remedy)

    def _wrong(self, what: str, remedy: str = YIELD) -> PluginError:
        return wrong(type(self.method), "updates", what, remedy)

    def _enter(self, stage: Stage) -> None:
        """Copy weights and reset optimizers, as the stage that begins asks for."""
        self.before_change()
        for source in dict.fromkeys(stage.copy.values()):
            if source in self.optimizers:
                self.optimizers[source].finalize()
                self.networks.changed()
        for target, source in stage.copy.items():
            self.networks.apply_ema(source)
            self.networks.copy(target, source)
        for role in stage.reset:
            self.optimizers[role].reset()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Give every trained role the weights to validate, score and export, inside the block."""
        self.before_change()
        with ExitStack() as stack:
            for optimizer in self.optimizers.values():
                stack.enter_context(optimizer.evaluating())
            self.networks.changed()
            yield
        self.networks.changed()

    def _accumulate(self, accumulated: _Accumulated, update: Update, batch: Batch, num_batches: int) -> None:
        assert update.role == accumulated.role, "micro-batches must yield the same updates"
        last = len(accumulated.updates) == num_batches - 1
        with span(BACKWARD, update.role):
            self.optimizers[update.role].backward(update.loss / num_batches, last=last)
        detached = Update(
            update.role, update.loss.detach(), {k: v.detach() for k, v in update.metrics.items()},
            update.per_sample, update.t, update.seen,
        )  # fmt: skip
        accumulated.updates.append(detached)
        accumulated.keys.extend(batch.keys)

    def _take(self, step: int, accumulated: _Accumulated, result: StepResult) -> None:
        role, updates = accumulated.role, accumulated.updates
        optimizer = self.optimizers[role]
        loss = torch.stack([update.loss for update in updates]).mean()
        metrics = {
            name: torch.stack([update.metrics[name] for update in updates]).mean() for name in updates[0].metrics
        }
        seen = _losses_seen(updates)
        with span(REDUCTION):
            self._reduce([loss, *metrics.values(), *seen.values(), *optimizer.gradients_to_average()])
        finite = torch.isfinite(loss)
        self.before_change()
        with span(OPTIMIZER, role):
            norm, taken = optimizer.step(step, healthy=finite)
        for history, (sums, counts) in seen.items():
            history.add(sums, counts)
        with span(AVERAGES):
            self.networks.update_averages(role)
        bad = _bad_samples(updates, len(accumulated.keys), loss)
        self.health.record(role, step, taken, bad, accumulated.keys, finite_loss=finite)

        prefix = "" if role == "student" else f"{role}/"
        result.metrics |= {
            f"{prefix}loss": loss,
            f"{prefix}lr": optimizer.learning_rate(step),
            f"{prefix}grad_norm": norm,
            **metrics,
        }
        if role == "student":
            result.bin_sums, result.bin_counts = _time_bins(updates, self.context.schedule.t_max)


def _bad_samples(updates: Sequence[Update], num_samples: int, loss: Tensor) -> Tensor:
    losses = [update.per_sample for update in updates if update.per_sample is not None]
    if not losses:
        return torch.zeros(num_samples, dtype=torch.bool, device=loss.device)
    return ~torch.isfinite(torch.cat(losses))


def _losses_seen(updates: Sequence[Update]) -> dict[LossHistory, Tensor]:
    """Return, for each history that draws of times go by, the sums and counts of its bins over the micro-batches."""
    parts: dict[LossHistory, list[SeenLosses]] = {}
    for seen in (each for update in updates for each in update.seen):
        parts.setdefault(seen.history, []).append(seen)
    dtype = torch.promote_types(updates[0].loss.dtype, torch.float32)  # exchanged with the loss, in its bucket
    return {history: sums_by_bin(each, dtype=dtype) for history, each in parts.items()}


def _time_bins(updates: Sequence[Update], t_max: float) -> tuple[Tensor | None, Tensor | None]:
    """Return sums and counts of the per-sample losses in ten equal bins of time, each of shape (10,)."""
    pairs = [(u.per_sample, u.t) for u in updates if u.per_sample is not None and u.t is not None]
    if not pairs:
        return None, None
    losses = torch.cat([pair[0] for pair in pairs]).double()
    t = torch.cat([pair[1] for pair in pairs]).double()
    bins = (t / (t_max + 1e-9) * NUM_TIME_BINS).long().clamp(0, NUM_TIME_BINS - 1)
    zeros = torch.zeros(NUM_TIME_BINS, dtype=torch.float64, device=losses.device)
    return zeros.scatter_add(0, bins, losses), zeros.scatter_add(0, bins, torch.ones_like(losses))
