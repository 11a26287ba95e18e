"""Training from the first step to the last: the loop, metrics, validation, checkpoints, and a clean stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Interrupted, UserError, described
from ..utils.disk import is_disk_full
from ..utils.memory import peak_memory_bytes
from ..utils.progress import working
from ..utils.seeds import set_generator_states
from ..utils.spans import DATA, METRICS, span
from .async_checkpoints import BackgroundSaves
from .checkpoint import CheckpointState, CheckpointStore
from .loop import Loop
from .metrics import MetricBuffer, MetricsFile, Throughput
from .processes import BesideTraining
from .profile import StepProfile
from .saved_state import changed_by_steps, saved_state
from .sharded_checkpoint import read_parts
from .time_bins import TimeBins

if TYPE_CHECKING:
    from ..plugin_api.batch import Batch
    from ..plugin_api.run_state import RunState
    from ..registry.registry import Registry
    from ..settings.run_settings import RunSettings
    from .observer import TrainingObserver
    from .processes import Processes
    from .signals import StopRequest
    from .strategy import Strategy
    from .tracking import Trackers

logger = logging.getLogger(__name__)


OTHER_SAMPLES = (
    "its samples are not those that the run began with: images or captions were added, removed or changed, a setting "
    "of the datasets is another (as micro_conditioning, random_flip, probability), or some that were out of reach and "
    "quarantined then can be read now"
)


def _once(sizes: Sequence[int] | None) -> list[int]:
    return list(dict.fromkeys(sizes or ()))


def _other_steps(before: Sequence[int] | None, now: Sequence[int]) -> str:
    """Return the refusal of a resume whose steps have another number of samples."""
    return (
        f"its steps had {_once(before)} samples over all processes, and these have {_once(now)}: train_batch_size x "
        "gradient_accumulation_steps x processes may be divided in another way, and must stay the same"
    )


@dataclass(frozen=True)
class Outputs:
    """Where a training's results go.

    Attributes:
        store: Checkpoints.
        metrics_file: metrics.jsonl.
        trackers: Watch the run.
    """

    store: CheckpointStore
    metrics_file: MetricsFile
    trackers: Trackers


@dataclass
class Trainer:
    """Takes the run from its first (or resumed) step to its last.

    Attributes:
        settings: The run's settings.
        loop: Takes optimizer steps.
        outputs: Where checkpoints and metrics go.
        state: What observing plugins see.
        registry: Whose hooks are called.
        strategy: How the processes share the networks.
        stop: Set by Ctrl-C and SIGTERM.
        observer: Shows progress and makes validation images.
        identity: What must be the same when a checkpoint is resumed, by name.
        total_steps: The last step.
        profile: Profiles some of the steps.
    """

    settings: RunSettings
    loop: Loop
    outputs: Outputs
    state: RunState
    registry: Registry
    strategy: Strategy
    stop: StopRequest
    observer: TrainingObserver
    identity: Mapping[str, Any]
    total_steps: int
    profile: StepProfile = field(default_factory=StepProfile)
    step: int = 0
    _buffer: MetricBuffer = field(default_factory=MetricBuffer)
    _bins: TimeBins = field(default_factory=TimeBins)
    _throughput: Throughput = field(default_factory=Throughput)
    _saved: int = -1
    _pending: int | None = None
    """Step of the checkpoint that is being written."""
    _whole: bool = True
    """Whether weights, counter and metrics belong to the same step."""

    @cached_property
    def saves(self) -> BackgroundSaves:
        """The writing of checkpoints, while training goes on unless the settings forbid it."""
        return BackgroundSaves(self.store, enabled=self.settings.checkpoint_async)

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        return self.outputs.store

    @property
    def processes(self) -> Processes:
        """Ranks."""
        return self.strategy.processes

    # -- resuming ---------------------------------------------------------------------------------------------------

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint, bit for bit. Raises UserError when it belongs to another run."""
        with self.processes.synchronized():
            saved = self.store.load(path, whole=not self.strategy.writes_parts)
        differing = {
            key: (saved.meta["identity"].get(key), value)
            for key, value in self.identity.items()
            if saved.meta["identity"].get(key) != value
        }
        if differing:
            told = {"data": lambda old, new: OTHER_SAMPLES, "samples_of_steps": _other_steps}
            lines = [
                told.get(key, lambda old, new, key=key: f"{key} was {old!r} and is {new!r}")(old, new)
                for key, (old, new) in differing.items()
            ]
            remedy = "put back what was, or use a new output_dir (what is cached stays valid)"
            raise UserError(f"{path} cannot be resumed: {'; '.join(lines)}", remedy)
        theirs, ours = saved.meta.get("stages", []), self._begun(saved.step)
        if theirs != ours:
            raise UserError(
                f"{path} cannot be resumed: its stages began at steps {theirs}, this run's at {ours}",
                "leave max_train_steps and the method's stages as they were, or use a new output_dir",
            )
        if self.strategy.lockstep:
            whole = not self.strategy.writes_parts
            read_parts(path, saved.tensors, self.loop.networks, self.loop.optimizers, whole=whole)
        self.loop.networks.load_state(saved.tensors)
        for role, optimizer in self.loop.optimizers.items():
            optimizer.load_tensors(saved.tensors.get(f"optimizer-{role}", {}), saved.meta["optimizers"][role])
            if optimizer.scaler and saved.meta["scalers"].get(role):
                optimizer.scaler.load_state_dict(saved.meta["scalers"][role])
        self.loop.method.load_state_dict(saved.tensors.get("method", {}))
        set_generator_states(saved.tensors["generators"])
        self.loop.health.load_state_dict(saved.meta["bad_steps"])
        self.step = self._saved = saved.step
        if self.processes.main:
            self.outputs.metrics_file.truncate_after(saved.step)
            discarded = self.store.discard_after(saved.step)
            if discarded:
                logger.info(f"later checkpoints are removed: {', '.join(path.name for path in discarded)}")

    def _begun(self, step: int) -> list[int]:
        """Return the first steps of the later stages that had begun after `step` steps."""
        return [start for start in self.loop.stage_starts if start < step]

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one, and wait for it. Every process must call it."""
        self._begin_save(waits=True)
        self._complete_save()

    def _begin_save(self, *, waits: bool = False) -> None:
        """Begin to write a checkpoint of the present step, after the one before is complete.

        Args:
            waits: Training waits until it is written, which needs no copy then.
        """
        if self.step in (self._saved, self._pending):
            return
        self._complete_save()
        state = self._checkpoint() if self.strategy.lockstep else None  # which all processes gather together
        with self.processes.synchronized():
            self._write(state, waits=waits)

    def _complete_save(self) -> None:
        """Wait for the checkpoint that is being written, and tell plugins of it. Every process must call it."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        with self.processes.synchronized():
            self._finish_write(step)
        self._tell_saved(step)

    def _tell_saved(self, step: int) -> None:
        folder = self.store.output_dir / f"checkpoint-{step}"
        self.registry.hook.on_checkpoint_saved(state=self.state, folder=folder, step=step)

    def _write(self, state: CheckpointState | None = None, *, waits: bool) -> None:
        self.flush()
        main = self.processes.main
        if main:
            self.outputs.metrics_file.sync()
            self.observer.on_saving(self.step)
        stepped = changed_by_steps(self.loop.networks)  # in all processes: it drops what they have gathered
        if main or (state is not None and state.sharded is not None):
            self.loop.before_change = self.saves.wait_copied
            self.saves.begin(state or self._checkpoint(), stepped=stepped, waits=waits)
        self._pending = self.step

    def _finish_write(self, step: int) -> None:
        with working(f"writing checkpoint-{step}") if self.processes.main else nullcontext():
            self.saves.finish()
        if self.processes.main:
            self.observer.on_saved(step)
        self._saved = step

    def _checkpoint(self) -> CheckpointState:
        meta = {"identity": dict(self.identity), "stages": self._begun(self.step)}
        return saved_state(self.loop, self.strategy, step=self.step, meta=meta, exchange=lambda: self._exchange)

    @cached_property
    def _exchange(self) -> BesideTraining:
        """The exchanges by which the processes write sharded tensors."""
        return BesideTraining(self.processes)

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self, steps: Iterator[list[Batch]]) -> None:
        """Run to the last step.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
            DistillError: The loss was not finite too often, in a row or in all; the state is saved.
        """
        self._throughput.restart()
        first = self.step
        self.profile.plan(first=first, last=self.total_steps)
        try:
            with self.stop.deferred(), self.processes.training():
                while self.step < self.total_steps:
                    with self.profile.step(self.step):
                        with working("the first step") if self.step == first else nullcontext():
                            self._step(self._next(steps))
                        self._log()
                    self._after_step()
        finally:
            self.profile.finish()
        self.loop.health.check()
        self.flush()
        self.loop.health.finish()

    def _next(self, steps: Iterator[list[Batch]]) -> list[Batch]:
        """Return the next step's micro-batches; the wait for them is counted by the host's clock alone."""
        with span(DATA):
            with self._throughput.waiting():
                batches = next(steps)
            return [batch.to(str(self.processes.device)) for batch in batches]

    def _step(self, batches: list[Batch]) -> None:
        self.loop.health.check()  # of the step before, while nothing of this one has happened
        self._whole = False
        result = self.loop.step(self.step, batches)
        self.step += 1
        self.state.step = self.step
        self._throughput.count(sum(map(len, batches)) * self.processes.world_size)
        with span(METRICS):
            self._buffer.add(self.step, result.metrics)
            self._bins.add(result)
        self._whole = True
        self.registry.hook.on_step_end(state=self.state, step=self.step)

    def _log(self) -> None:
        if self._due(self.settings.log_step_interval) or self.step == self.total_steps:
            with span(METRICS):
                self.flush()
        else:
            self.observer.on_step(self.step, None)

    def _after_step(self) -> None:
        ended = self._pending or 0 if self.processes.main and self.saves.ended else 0
        stop, complete = self.processes.greatest_so_far(self.stop.requested, ended)
        if complete and complete == self._pending:  # all processes know, and none waits
            self._complete_save()
        if stop:
            self.save()
            raise Interrupted(f"stopped at step {self.step}; the checkpoint is complete")
        with self._throughput.paused(), self.observer.pause():
            self.profile.end_after(self.step - 1)
            self.observer.between_steps()
            if self._due(self.settings.validation_step_interval) and self.step < self.total_steps:
                self.observer.validate(self.step)
            if self._due(self.settings.checkpoint_step_interval):
                self._begin_save()
            if not self.settings.checkpoint_async:
                self._complete_save()

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    def flush(self) -> None:
        """Read the metrics since the last flush from the device and pass them on; the one place that waits for it."""
        now = time.perf_counter()
        rows = self._buffer.flush()
        if not rows:
            return
        figures = self._throughput.read(now)
        rows = [(step, {**values, **figures}) for step, values in rows]
        if self.processes.main:
            self.outputs.metrics_file.append(rows)
        for step, values in rows[:-1]:
            self.outputs.trackers.log(values, step)
        step, values = rows[-1]
        full = {**values, **self._bins.flush(), "memory_gib": peak_memory_bytes(str(self.processes.device)) / 2**30}
        self.outputs.trackers.log(full, step)
        self.registry.hook.on_log(state=self.state, metrics=full, step=step)
        self.observer.on_step(step, values)

    def save_after_failure(self, error: BaseException) -> Path | None:
        """Save a checkpoint of the last whole step, if possible, when the run fails; return the newest there is.

        Takes part in no exchange between processes, since the others may be elsewhere.
        """
        self._try(self._await_save, error)
        unsaved = self._whole and self.step not in (0, self._saved) and not isinstance(error, Interrupted)
        if unsaved and self.strategy.lockstep:
            logger.warning(f"step {self.step} is not saved: the others of its processes hold parts of the weights")
        elif unsaved:
            self._try(self._save_alone, error)
        return self.store.latest()

    def _try(self, save: Callable[[], None], error: BaseException) -> None:
        try:
            save()
        except Exception as second:  # the first error is the one to report
            full = is_disk_full(second) and is_disk_full(error)
            reason = "there is no room for it" if full else described(second)
            logger.warning(f"step {self.step} could not be saved: {reason}")

    def _save_alone(self) -> None:
        self._write(waits=True)
        step, self._pending = self.step, None
        self._finish_write(step)

    def _await_save(self) -> None:
        """Wait for the checkpoint that is being written when the run fails, on this process alone."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        self._finish_write(step)
        if self.processes.main:
            self._tell_saved(step)
