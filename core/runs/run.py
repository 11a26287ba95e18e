"""A distillation run, start to end: the one direction that everything flows in.

config -> family -> data -> networks and optimizers -> loop, validation, checkpoints -> export -> scores -> publish
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.observer import TrainingObserver
from ..engine.signals import StopRequest
from ..errors import DistillError, Interrupted, UserError, described
from ..evaluation.evaluators import evaluation_notices
from ..utils.collection import resume_collection
from ..utils.console import console
from ..utils.disk import explained
from ..utils.files import write_text
from ..utils.progress import working
from .agreement import require_same_configuration, require_same_start, require_shared_folder
from .builders import check_method_sources
from .components import RunComponents
from .memory_plan import explain_memory
from .opening import OpenFolder, check_resources, miniature_note, passed_over
from .output_folder import ONLINE_FOLDER, PROFILE_FOLDER, REPORTS_FOLDER, RESOLVED, STUDENT_FOLDER, named_step
from .run_log import ENDS, ENDS_WELL, RunLog

if TYPE_CHECKING:
    from ..evaluation.result import Evaluation
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..utils.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    output_dir: Path
    student: Path
    steps: int
    evaluation: Evaluation | None
    grid: Path | None = None
    """The last validation's side-by-side image."""
    prompt: str = ""
    """The first validation prompt."""
    rank: int = 0


def run(configuration: Configuration, registry: Registry) -> RunResult:
    """Distil, from the first step or where the last run stopped, to the exported student.

    What it logs is printed to stderr by the first process, and kept in ``run.log``.

    Args:
        configuration: Validated.
        registry: The run's plugins.

    Raises:
        UserError: Something is unusable as given; nothing was lost.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        DistillError: The run failed; what could be saved was, and the message says how to resume.
    """
    with StopRequest() as stop:
        return Run(configuration, registry, stop).execute()


class Run(TrainingObserver):
    """One run, from opening its folder to publishing its student.

    Args:
        configuration: Validated.
        registry: The run's plugins.
        stop: Set by Ctrl-C and SIGTERM.
    """

    def __init__(self, configuration: Configuration, registry: Registry, stop: StopRequest) -> None:
        self.parts = RunComponents(configuration, registry, stop, observer=self)
        self.settings = configuration.run
        self._stop = stop
        self._log = RunLog()
        self._folder = OpenFolder(self.settings.output_dir, self._log)
        self._progress: Progress | None = None
        self._training = self._reported = False

    def execute(self) -> RunResult:
        """The whole run."""
        with console(enabled=self.parts.processes.main, note=self._log.note):
            try:
                if self.parts.processes.heartbeats is not None:
                    self.parts.processes.heartbeats.on_stuck = self._stuck
                self._open()
                with self.parts.kernels():
                    return self._execute()
            except BaseException as error:
                refused = explained(error, place=self.settings.output_dir, running=self._training)
                refused = refused or self.parts.processes.reason(error)
                self.parts.processes.fail(refused or error)
                self._log.note(f"{ENDS}{described(refused or error)}")
                with self._stop.deferred():  # a launcher stops all processes as soon as one has ended
                    self._failed(refused or error)
                if refused is not None:
                    raise refused from error
                raise
            finally:
                self._folder.close()
                self.parts.processes.close()

    def _execute(self) -> RunResult:
        with working("reading the model's files"):
            self.parts.family.check_source()
        self.parts.complete()
        self._check_model()
        with self.parts.processes.synchronized():
            check_resources(self.parts)
        resume_collection(for_good=True)
        self.parts.data.prepare()
        for line in self.parts.data.never_trained(self.parts.total_steps):
            logger.warning(line)
        _ = self.parts.stages  # a method may refuse this number of steps, and does so before weights load
        self._prepare_validation()
        with self.parts.processes.synchronized():
            check_resources(self.parts, steps=self.parts.total_steps)
        self._resume()
        trainer = self.parts.trainer
        require_same_start(
            self.parts.processes, trainer.loop.networks, step=trainer.step, data=self.parts.data.fingerprint(),
            sharded=self.parts.strategy.lockstep,
        )  # fmt: skip
        self._start_tracking()
        self.parts.registry.hook.on_run_start(state=self.parts.trainer.state)
        with self._progress or self._make_progress():
            self._training = True
            if self.settings.profile_steps and self.parts.processes.main:
                self._folder.files.claim(PROFILE_FOLDER)
            self.parts.trainer.train(self.parts.data.steps(self.parts.trainer.step))
            self.between_steps()  # where there was no step to take
            if self.settings.validation_step_interval:
                self.validate(self.parts.trainer.step)
            self.parts.trainer.save()
        return self._finish()

    # -- the flow ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self.parts.config.miniature:
            logger.info(miniature_note(self.parts.config))
        processes = self.parts.processes
        strategy = self.parts.strategy
        if processes.world_size > 1 or strategy.lockstep:
            logger.info(f"{processes.described}: {strategy.described}")
        require_same_configuration(processes, self.parts.config)
        with processes.synchronized():
            if processes.main:
                self._folder.open(self.parts)
        require_shared_folder(processes, self.settings.output_dir)
        _ = self.parts.publishers  # says now, rather than after hours, what would keep one from working
        for line in evaluation_notices(self.parts.registry, self.parts.config):
            logger.warning(line)

    def _check_model(self) -> None:
        """Refuse what only the model's own config can tell, still before weights load."""
        _ = self.parts.compilation  # refuses what cannot be compiled
        self.parts.check_products()
        self.parts.sampler()  # refuses steps and guidance that the method cannot sample with
        check_method_sources(self.parts.config, self.parts.registry)
        method, family = self.parts.method, self.parts.family
        needs = method.requires(method.config, method.setup)
        self.parts.strategy.check_method(self.settings.distillation_method, needs)
        if needs.finite_snr and family.prediction_type == "epsilon" and family.schedule.zero_terminal_snr:
            raise UserError(
                f"{family.settings.source}: its scheduler has zero terminal SNR and predicts epsilon, from which "
                f"no image can be computed at the last timestep; {self.settings.distillation_method} needs it there",
                "use the model's v_prediction version, or a scheduler config without rescale_betas_zero_snr",
            )

    def between_steps(self) -> None:
        """Report on the data, once: after the first step, which would have to wait for the charts."""
        if self._reported:
            return
        self._reported = True
        with self.parts.processes.synchronized(), self._folder.writing(REPORTS_FOLDER):
            reports = self.parts.data.write_reports(self.settings.output_dir / REPORTS_FOLDER)
        for report in reports:
            logger.info(f"report on dataset {report.id!r}: {report.folder / 'report.md'}")
            self.parts.trackers.text(f"training_data/{report.id}", report.text, self.parts.trainer.step)
            self.parts.trackers.images(f"training_data/{report.id}", report.images, self.parts.trainer.step)

    def _prepare_validation(self) -> None:
        for notice in self.parts.method.notices():
            logger.info(notice)
        validator = self.parts.validator
        with self.parts.processes.synchronized():
            if validator and self._takes_part:
                from ..evaluation.prompts import cut_prompts
                from ..evaluation.validation import describe

                logger.info(describe(validator.plan))
                plan = validator.plan
                for line in cut_prompts(self.parts.family, [*plan.prompts, plan.negative_prompt]):
                    logger.warning(line)
                with working("encoding the validation prompts"):
                    for each in filter(None, (validator, self.parts.scorer)):
                        each.prepare()
                self.parts.family.release_encoders()

    def _resume(self) -> None:
        wanted = self.settings.resume_from_checkpoint
        with self.parts.processes.synchronized():
            _ = self.parts.networks
        _ = self.parts.trainer  # sharding the networks takes all processes
        with self.parts.processes.synchronized():
            if self.parts.processes.main:
                store = self.parts.trainer.store  # it mends what a killed save left; the others look after that
                step = named_step(wanted)
                if wanted == "latest":
                    store.download()
                elif step is not None and not Path(wanted or "").is_dir():
                    store.download(step)
                passed_over(store, wanted)
                self._folder.note_checkpoints()
        trainer = self.parts.trainer
        path = self._checkpoint(wanted)
        if path is not None:
            with working(f"reading {path}"):
                trainer.resume(path)
            logger.info(f"resumed from {path} at step {trainer.step}")
        elif self.parts.processes.main:
            trainer.outputs.metrics_file.truncate_after(0)
        if trainer.step > self.parts.total_steps:
            raise UserError(
                f"max_train_steps = {self.parts.total_steps} lies before the checkpoint's step {trainer.step}",
                f"raise max_train_steps above {trainer.step}",
            )
        if self.parts.processes.main:
            resolved = json.dumps(self.parts.config.resolved(), indent=2)
            write_text(self.settings.output_dir / RESOLVED, resolved + "\n")

    def _checkpoint(self, wanted: str | None) -> Path | None:
        """The checkpoint here that the settings ask for; None to start afresh."""
        if not wanted or wanted == "latest":
            return self.parts.trainer.store.latest() if wanted else None
        for path in (Path(wanted), self.settings.output_dir / wanted):
            if path.is_dir():
                return path
        remote = self.parts.remote_checkpoints
        searched = (
            f"{self.settings.output_dir} nor in {remote.backend.location}" if remote else self.settings.output_dir
        )
        raise UserError(
            f"resume_from_checkpoint = {wanted!r}: no such checkpoint, neither as a path nor in {searched}",
            "use `latest`, or the name of a checkpoint-N folder there",
        )

    def _start_tracking(self) -> None:
        from ..plugin_api.tracker import RunInfo

        settings, resolved = self.settings, self.parts.config.resolved()
        hparams = {key: value for key, value in resolved.items() if isinstance(value, int | float | str | bool)}
        name = settings.tracker_run_name or settings.output_dir.name
        info = RunInfo(
            settings.output_dir, settings.tracker_project_name, name, resolved, hparams, self.parts.trainer.step
        )
        with self._folder.watching():
            self.parts.trackers.start(info)
        text = json.dumps(resolved, indent=2)
        self.parts.trackers.text("config", f"```json\n{text}\n```", self.parts.trainer.step)

    def _make_progress(self) -> Progress:
        from ..utils.progress import make_progress

        progress = make_progress(
            self.parts.total_steps,
            start_step=self.parts.trainer.step,
            samples_per_step=self.parts.data.samples_per_step,
        )
        if self.parts.processes.main:
            self._progress = progress
        return progress

    def on_step(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Show `step` on the progress bar, with its metrics where they were read."""
        if self._progress is None:
            return
        self._progress.advance(step)
        self.parts.compilation.report(step)
        if metrics is not None:
            self._progress.log(step, metrics)

    def on_saving(self, step: int) -> None:
        """Note what is written before it is."""
        self._folder.files.claim(f"checkpoint-{step}")

    def on_saved(self, step: int) -> None:
        """Note what was written."""
        self._folder.files.wrote(f"checkpoint-{step}")

    def pause(self) -> AbstractContextManager[None]:
        """Return a context whose time does not count in the progress bar's estimate."""
        return self._progress.pace.pause() if self._progress else nullcontext()

    @property
    def _takes_part(self) -> bool:
        """True if this process makes images: the first one, or all where each holds a part of the weights."""
        return self.parts.processes.main or self.parts.strategy.lockstep

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Make all processes leave the block together; those that wait for each other inside it fail together."""
        if not self.parts.strategy.lockstep:
            with self.parts.processes.synchronized():
                yield
            return
        self.parts.processes.barrier()  # what the first one wrote is there for all
        yield
        self.parts.processes.barrier()

    def validate(self, step: int) -> Path:
        """Make validation images with the weights of `step`, and return their folder."""
        folder = self.settings.output_dir / "validation"
        with self._together():
            if self.parts.validator is not None and self._takes_part:
                names, trainer = self.parts.validator.folders(step), self.parts.trainer
                with trainer.loop.evaluating(), self.parts.networks.averaged(), self._folder.writing(*names):
                    folder = self.parts.validator.run(
                        step, self.parts.networks, self.parts.trackers, writes=self.parts.processes.main
                    )
                    if self.parts.scorer is not None:
                        self.parts.scorer.run(step, self.parts.networks, self.parts.trackers, folder=folder)
                self.parts.family.release_encoders()  # the autoencoder's memory is the training's
        self.parts.registry.hook.on_validation_end(state=self.parts.trainer.state, folder=folder, step=step)
        return folder

    def _finish(self) -> RunResult:
        from .export import evaluate_student, export_online, export_student, last_grid, publish_student

        student, evaluation, info = self.settings.output_dir / STUDENT_FOLDER, None, None
        with self._together():
            main = self.parts.processes.main
            if main:
                self._folder.files.claim(STUDENT_FOLDER, ONLINE_FOLDER)
            if self._takes_part:
                with self.parts.trainer.loop.evaluating(), self.parts.networks.averaged():
                    info = export_student(self.parts, student)
                    if self.settings.evaluation_num_samples:
                        evaluation = evaluate_student(self.parts)
                if self.settings.export_online_weights:
                    export_online(self.parts, self.settings.output_dir / ONLINE_FOLDER)
            if main and info is not None:
                publish_student(self.parts, student, info, evaluation)
                self.parts.trackers.finish(evaluation.scalars() if evaluation else None)
                profile = [PROFILE_FOLDER] if self.settings.profile_steps else []
                self._folder.files.wrote(STUDENT_FOLDER, ONLINE_FOLDER, *profile, *self._folder.watched)
        self._log.note(ENDS_WELL)
        self.parts.registry.hook.on_run_end(state=self.parts.trainer.state)
        self.parts.trainer.store.wait()
        self.parts.data.close()
        self.parts.processes.barrier()
        prompt = self.parts.prompts[0] if self.parts.prompts else ""
        return RunResult(
            self.settings.output_dir, student, self.parts.trainer.step, evaluation, last_grid(self.settings.output_dir),
            prompt,
            self.parts.processes.rank,
        )  # fmt: skip

    def _failed(self, error: BaseException) -> None:
        """Save what can be saved and say how to go on."""
        if "trainer" in vars(self.parts) and (self._training or not isinstance(error, UserError)):
            saved = self.parts.trainer.save_after_failure(error)
            try:
                self.parts.registry.hook.on_exception(state=self.parts.trainer.state, error=error)
            except DistillError as second:  # the first error is the one that ends the run
                logger.warning(str(second))
            self.parts.trackers.finish()
            self.parts.trainer.store.wait()
            self.parts.data.close()
            if saved is not None:
                logger.info(f"saved: {saved}. To go on: {_resume_command(self.settings.output_dir)}")
        for hint in explain_memory(self.parts, error):
            logger.info(hint)

    def _stuck(self, error: DistillError) -> None:
        """Complete what is being saved where nothing wakes the main thread from its wait for a process that is lost."""
        logger.error(str(error))
        self._log.note(f"{ENDS}{described(error)}")
        if "trainer" in vars(self.parts) and self.parts.processes.main:
            saved = self.parts.trainer.save_after_failure(Interrupted("no state of this step can be had"))
            self.parts.trainer.store.wait()
            logger.info(f"the newest checkpoint: {saved}. To go on: {_resume_command(self.settings.output_dir)}")


def _resume_command(output_dir: Path) -> str:
    return f"distill run --config {output_dir / RESOLVED} --set resume_from_checkpoint=latest"
