"""A distillation run, start to end: the one direction that everything flows in.

config -> family -> data -> networks and optimizers -> loop, validation, checkpoints -> export -> scores -> publish
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .assemble import build_family, build_method, lora_settings
from .config.output import check_output_dir, clear_output_dir
from .engine.signals import StopRequest
from .errors import DistillError, Interrupted, UserError
from .files import write_text

if TYPE_CHECKING:
    from .config import Configuration
    from .data.pipeline import DataPipeline
    from .engine.optimize import RoleOptimizer
    from .engine.processes import Processes
    from .engine.progress import Progress
    from .evaluation_report import Evaluation
    from .method import Sampler
    from .networks import Networks
    from .plugins import Registry
    from .publishing import Publishers
    from .training import Trainer
    from .validation import Validator

Say = Callable[[str], None]
RESOLVED = "config.resolved.json"
MINIATURE = (
    "no model named: this distils the miniature that ships with the family, a small but real and trained model for "
    "trying things out. Your own: --model PATH_OR_ID --data FILE (`distill config init` writes both files)"
)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    output_dir: Path
    student: Path
    steps: int
    evaluation: Evaluation | None
    grid: Path | None = None
    """The last validation's side-by-side picture."""
    prompt: str = ""
    """The first validation prompt."""
    rank: int = 0


def run(configuration: Configuration, registry: Registry, *, say: Say | None = None) -> RunResult:
    """Distil, from the first step or where the last run stopped, to the exported student.

    Args:
        configuration: Validated.
        registry: The run's plugins.
        say: Where lines for people go; stderr unless given.

    Raises:
        UserError: Something is unusable as given; nothing was lost.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        DistillError: The run failed; what could be saved was, and the message says how to resume.
    """
    with StopRequest() as stop:
        return Run(configuration, registry, stop, say or _to_stderr).execute()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Run:
    """The parts of one run, each made when it is first needed."""

    def __init__(self, configuration: Configuration, registry: Registry, stop: StopRequest, say: Say) -> None:
        self.config, self.settings, self.registry = configuration, configuration.run, registry
        self._stop, self._say = stop, say
        self._progress: Progress | None = None

    def execute(self) -> RunResult:
        """The whole run."""
        try:
            self._open()
            return self._execute()
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            self.processes.close()

    def _execute(self) -> RunResult:
        self.family.check_source()
        self._check_model()
        self.data.prepare()
        self._prepare_validation()
        self._resume()
        self._start_tracking()
        self.registry.hook.on_run_start(state=self.trainer.state)
        with self._progress or self._make_progress():
            self.trainer.train(self.data.steps(self.trainer.step))
            if self.settings.validation_step_interval:
                self._validate(self.trainer.step)
            self.trainer.save()
        return self._finish()

    def say(self, line: str) -> None:
        """A line for people, once, from the main process."""
        if self.processes.main:
            (self._progress.say if self._progress else self._say)(line)

    # -- parts ------------------------------------------------------------------------------------------------------

    @cached_property
    def processes(self) -> Processes:
        """Ranks and device."""
        from .engine.processes import Processes

        return Processes(self.settings.device)

    @cached_property
    def family(self) -> Any:
        """The run's model."""
        return build_family(self.config, self.registry, device=str(self.processes.device))

    @cached_property
    def method(self) -> Any:
        """The run's algorithm."""
        return build_method(self.config, self.registry, self.family)

    @cached_property
    def data(self) -> DataPipeline:
        """From the data file to batches."""
        from .data.pipeline import DataPipeline

        settings, processes = self.settings, self.processes
        return DataPipeline(
            self.config, self.registry, self.family, micro_batch_size=settings.train_batch_size,
            accumulation=settings.gradient_accumulation_steps, rank=processes.rank, world_size=processes.world_size,
            seed=settings.seed, cache_root=settings.output_dir / "cache", say=self.say,
        )  # fmt: skip

    @cached_property
    def optimizer_plugin(self) -> Any:
        """Builds the optimizers."""
        return self.registry.get("optimizer", self.settings.optimizer)(self.config.optimizer)

    @cached_property
    def networks(self) -> Networks:
        """Networks by role, with the weights of ``init_lora`` if one is named."""
        import torch

        from .networks import Networks

        settings = self.settings
        networks = Networks(
            self.family, self.method.roles(self.config.method, self.method.setup), lora=lora_settings(self.config),
            seed=settings.seed, gradient_checkpointing=settings.gradient_checkpointing,
            parameter_dtype=getattr(torch, self.optimizer_plugin.parameter_dtype),
            ema_decay=settings.ema_decay if settings.use_ema else None,
        )  # fmt: skip
        if settings.init_lora:
            networks.start_from("student", str(settings.init_lora))
        return networks

    @cached_property
    def validator(self) -> Validator | None:
        """Makes validation pictures; None when validation is off."""
        from .validation import ValidationPlan, Validator

        settings = self.settings
        if not settings.validation_step_interval:
            return None
        plan = ValidationPlan.from_run(
            settings, self.family,
            self.sampler(settings.validation_num_inference_steps, settings.validation_guidance),
            prompts=self.prompts, fallback_resolution=self.resolution, role=self.method.result_role(),
        )  # fmt: skip
        return Validator(self.family, plan, settings.output_dir)

    @cached_property
    def prompts(self) -> Sequence[str]:
        """Validation prompts, or captions of the data."""
        return self.config.validation_prompts or self.data.captions(4)

    @cached_property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of pictures where the run names none."""
        if self.settings.validation_resolution:
            return self.settings.validation_resolution[0]
        return self.data.resolution

    def sampler(self, steps: int | None = None, guidance: float | None = None) -> Sampler:
        """The method's sampler, at the validation's steps and guidance unless others are given."""
        steps = steps or self.settings.validation_num_inference_steps
        guidance = self.settings.validation_guidance if guidance is None else guidance
        return self.method.sampler(self.family.schedule, num_inference_steps=steps, guidance_scale=guidance)

    @cached_property
    def trackers(self) -> Any:
        """Where the run is watched; none on ranks other than the first."""
        from .tracking import build_trackers

        names = self.settings.report_to if self.processes.main else ()
        return build_trackers(self.registry, names, self.config.trackers, self.say)

    @cached_property
    def publishers(self) -> Publishers:
        """Where the student goes at the end."""
        from .publishing import build_publishers

        return build_publishers(self.registry, self.config, self.say)

    def _optimizer(self, role: str) -> RoleOptimizer:
        import torch

        from .engine.lr import lr_lambda
        from .engine.optimize import RoleOptimizer
        from .optimizer import OptimizerSettings

        settings, parameters = self.settings, self.networks.parameters(role)
        optimizer = self.optimizer_plugin.build(
            parameters,
            OptimizerSettings(
                settings.learning_rate, settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon,
                settings.adam_weight_decay,
            ),
        )  # fmt: skip
        fp16 = settings.mixed_precision == "fp16"
        return RoleOptimizer(
            optimizer, parameters, learning_rate=settings.learning_rate,
            schedule=lr_lambda(
                settings.lr_scheduler, settings.lr_warmup_steps, self.total_steps, num_cycles=settings.lr_num_cycles,
                power=settings.lr_power, end_factor=settings.lr_end / settings.learning_rate,
            ),
            max_grad_norm=settings.max_grad_norm,
            scaler=torch.amp.GradScaler(self.processes.device.type) if fp16 else None,
        )  # fmt: skip

    @cached_property
    def total_steps(self) -> int:
        """The last optimizer step: of max_train_steps and num_train_epochs, whichever ends first."""
        settings, ends = self.settings, []
        if settings.max_train_steps:
            ends.append(settings.max_train_steps)
        if settings.num_train_epochs:
            ends.append(max(1, round(settings.num_train_epochs * self.data.steps_per_epoch())))
        return min(ends)

    @cached_property
    def trainer(self) -> Trainer:
        """The loop with everything it needs."""
        import torch

        from .context import Context, Runtime
        from .engine.checkpoint import CheckpointStore
        from .engine.health import HealthMonitor
        from .engine.loop import Loop
        from .engine.metrics import MetricsFile
        from .engine.state import RunState
        from .training import Trainer

        settings, processes = self.settings, self.processes
        autocast = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision]
        context = Context(Runtime(self.family, self.networks, settings.seed, processes.device, autocast))
        optimizers = {role: self._optimizer(role) for role in self.networks.trained_roles()}
        loop = Loop(
            self.method, context, self.networks, optimizers,
            health=HealthMonitor(settings.max_bad_steps), reduce=processes.average,
        )  # fmt: skip
        networks = {role: self.networks.module(role) for role in self.networks.roles}
        return Trainer(
            settings=settings, loop=loop,
            store=CheckpointStore(
                settings.output_dir, limit=settings.checkpoints_total_limit, read_only=not processes.main
            ),
            metrics_file=MetricsFile(settings.output_dir / "metrics.jsonl"), trackers=self.trackers,
            state=RunState(self.config, settings.output_dir, self.method, self.family, context, networks),
            registry=self.registry, processes=processes, stop=self._stop, validate=self._validate,
            identity={"method": settings.distillation_method, "family": settings.model_family,
                      "model": self.family.fingerprint("denoiser"), "data": self.data.fingerprint()},
            total_steps=self.total_steps, samples_per_step=self.data.global_batch, on_step=self._on_step,
        )  # fmt: skip

    # -- the flow ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        folder = self.settings.output_dir
        if self.config.miniature:
            self.say(MINIATURE)
        if self.processes.main:
            state = check_output_dir(self.config)
            if state.clear:
                clear_output_dir(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for notice in (*self.config.notices, *state.notices):
                self.say(notice)
        self.processes.barrier()
        self.publishers.check()

    def _check_model(self) -> None:
        """What only the model's own config can tell, still before weights load."""
        needs = self.method.requires(self.config.method, self.method.setup)
        if needs.finite_snr and self.family.prediction_type == "epsilon" and self.family.schedule.zero_terminal_snr:
            raise UserError(
                f"{self.family.settings.source}: its scheduler has zero terminal SNR and predicts epsilon, from which the "
                f"picture cannot be computed at the last timestep; {self.settings.distillation_method} needs it there",
                "use the model's v_prediction version, or a scheduler config without rescale_betas_zero_snr",
            )

    def _prepare_validation(self) -> None:
        for notice in self.method.notices():
            self.say(notice)
        if self.validator and self.processes.main:
            from .validation import describe

            for line in (describe(self.validator.plan), *self.validator.plan.notices()):
                self.say(line)
            self.validator.prepare()
            self.family.release_encoders()

    def _resume(self) -> None:
        wanted, trainer = self.settings.resume_from_checkpoint, self.trainer
        if wanted == "latest":
            path = trainer.store.latest()
        else:
            path = _checkpoint_path(wanted, self.settings.output_dir) if wanted else None
        if path is not None:
            trainer.resume(path)
            self.say(f"resumed from {path} at step {trainer.step}")
        if trainer.step > self.total_steps:
            raise UserError(
                f"max_train_steps = {self.total_steps} lies before the checkpoint's step {trainer.step}",
                f"raise max_train_steps above {trainer.step}",
            )
        if self.processes.main:
            write_text(self.settings.output_dir / RESOLVED, json.dumps(self.config.resolved(), indent=2) + "\n")

    def _start_tracking(self) -> None:
        from .tracker import RunInfo

        settings, resolved = self.settings, self.config.resolved()
        hparams = {key: value for key, value in resolved.items() if isinstance(value, int | float | str | bool)}
        name = settings.tracker_run_name or settings.output_dir.name
        info = RunInfo(settings.output_dir, settings.tracker_project_name, name, resolved, hparams, self.trainer.step)
        self.trackers.start(info)
        text = json.dumps(resolved, indent=2)
        self.trackers.text("config", f"```json\n{text}\n```", self.trainer.step)

    def _make_progress(self) -> Progress:
        from .engine.progress import make_progress

        progress = make_progress(
            self.total_steps, start_step=self.trainer.step, samples_per_step=self.data.global_batch
        )
        if self.processes.main:
            self._progress = progress
        return progress

    def _on_step(self, step: int, metrics: Mapping[str, float] | None) -> None:
        if self._progress is None:
            return
        self._progress.advance(step)
        if metrics is not None:
            self._progress.log(step, metrics)

    def _validate(self, step: int) -> Path:
        folder = self.settings.output_dir / "validation"
        if self.validator is not None and self.processes.main:
            with self.networks.averaged():
                folder = self.validator.run(step, self.networks, self.trackers)
            self.registry.hook.on_validation_end(state=self.trainer.state, folder=folder, step=step)
        self.processes.barrier()
        return folder

    def _finish(self) -> RunResult:
        from .finish import evaluate_student, export_student, last_grid, publish_student

        student, evaluation = self.settings.output_dir / "student", None
        if self.processes.main:
            with self.networks.averaged():
                export_student(self, student)
                if self.settings.evaluation_num_samples:
                    evaluation = evaluate_student(self)
            publish_student(self, student, evaluation)
            self.trackers.finish(evaluation.scalars() if evaluation else None)
        self.registry.hook.on_run_end(state=self.trainer.state)
        self.data.close()
        self.processes.barrier()
        prompt = self.prompts[0] if self.prompts else ""
        return RunResult(
            self.settings.output_dir, student, self.trainer.step, evaluation, last_grid(self.settings.output_dir), prompt,
            self.processes.rank,
        )  # fmt: skip

    def _failed(self, error: BaseException) -> None:
        """Save what can be saved and say how to go on."""
        if isinstance(error, UserError) or "trainer" not in self.__dict__:
            return
        saved = self.trainer.save_after_failure(error)
        self.registry.hook.on_exception(state=self.trainer.state, error=error)
        self.trackers.finish()
        self.data.close()
        if saved is not None:
            self.say(f"saved: {saved}. To go on: {_resume_command(self.settings.output_dir)}")
        if not isinstance(error, Interrupted | DistillError):
            self._explain_memory(error)

    def _explain_memory(self, error: BaseException) -> None:
        from .engine.memory import is_out_of_memory, out_of_memory_hint
        from .memory_plan import memory_settings

        if is_out_of_memory(error):
            self.say(out_of_memory_hint(memory_settings(self)))


def _checkpoint_path(wanted: str, output_dir: Path) -> Path:
    for path in (Path(wanted), output_dir / wanted):
        if path.is_dir():
            return path
    raise UserError(
        f"resume_from_checkpoint = {wanted!r}: there is no such checkpoint, neither as a path nor in {output_dir}",
        "use `latest`, or the name of a checkpoint-N folder in output_dir",
    )


def _resume_command(output_dir: Path) -> str:
    return f"distill run --config {output_dir / RESOLVED} --set resume_from_checkpoint=latest"
