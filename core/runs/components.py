"""The parts of a run, each made when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..utils.progress import working
from .agreement import require_same_weights
from .builders import adapter_shape, build_family, build_method, completed_configuration, method_needs
from .output_folder import CACHE_FOLDER, PROFILE_FOLDER

if TYPE_CHECKING:
    from ..data.pipeline import DataPipeline
    from ..diffusion.sampler import Sampler
    from ..engine.checkpoint import CheckpointStore
    from ..engine.compilation import Compilation
    from ..engine.networks import Networks
    from ..engine.observer import TrainingObserver
    from ..engine.optimize import RoleOptimizer
    from ..engine.processes import Processes
    from ..engine.remote_checkpoints import RemoteCheckpoints
    from ..engine.signals import StopRequest
    from ..engine.strategy import Strategy
    from ..engine.trainer import Trainer
    from ..evaluation.validation import Validator
    from ..evaluation.validation_scores import ValidationScorer
    from ..plugin_api.stage import Stage
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..utils.memory import MemorySettings
    from .publishing import Publishers

logger = logging.getLogger(__name__)


class RunComponents:
    """From a configuration to family, data, networks, optimizers and trainer.

    Args:
        configuration: Validated.
        registry: The run's plugins.
        stop: Set by Ctrl-C and SIGTERM.
        observer: Told of the training's steps.
    """

    def __init__(
        self, configuration: Configuration, registry: Registry, stop: StopRequest, *, observer: TrainingObserver
    ) -> None:
        self.config, self.settings, self.registry = configuration, configuration.run, registry
        self._stop, self._observer = stop, observer

    # -- parts ------------------------------------------------------------------------------------------------------

    @cached_property
    def processes(self) -> Processes:
        """Ranks and device."""
        from ..engine.processes import Processes

        return Processes(self.settings.device, timeout_seconds=self.settings.process_timeout)

    @cached_property
    def strategy(self) -> Strategy:
        """How the processes share the networks."""
        import os

        from ..engine.parallel import build_strategy, parallel_settings

        settings = self.settings
        asked = parallel_settings(
            settings.parallel, shard_size=settings.parallel_shard_size, offload=settings.parallel_offload,
            environment=os.environ,
        )  # fmt: skip
        strategy = build_strategy(self.processes, asked)
        strategy.check(
            model_type=settings.model_type, optimizer=self.registry.get("optimizer", settings.optimizer),
            quantised=settings.frozen_base_precision != "no_change", mixed_precision=settings.mixed_precision,
        )  # fmt: skip
        strategy.require_packages()
        return strategy

    def kernels(self) -> AbstractContextManager[None]:
        """Return a context that computes with the kernels of the settings."""
        from ..engine.kernels import kernels

        return kernels(self.processes.device, tf32=self.settings.tf32, attention=self.settings.attention_kernels)

    @cached_property
    def family(self) -> Any:
        """The run's model."""
        return build_family(self.config, self.registry, device=str(self.processes.device))

    @cached_property
    def method(self) -> Any:
        """The run's algorithm."""
        return build_method(self.config, self.registry, self.family)

    def complete(self) -> None:
        """Fill in what depends on the model's own files, which are read by now; log what that is."""
        before, self.config = self.config, completed_configuration(self.config, self.registry, self.family)
        for line in self.config.notices[len(before.notices) :]:
            logger.info(line)

    @cached_property
    def data(self) -> DataPipeline:
        """From the data file to batches."""
        from ..data.loader import BatchContents, BatchLayout
        from ..data.pipeline import DataPipeline

        settings, processes = self.settings, self.processes
        needs = method_needs(self.config, self.registry, self.family)
        checkpoints = settings.output_dir.glob("checkpoint-*/manifest.json")
        resumes = settings.resume_from_checkpoint is not None and any(checkpoints)
        return DataPipeline(
            self.config, self.registry, self.family,
            layout=BatchLayout(
                settings.train_batch_size, settings.gradient_accumulation_steps, processes.rank, processes.world_size
            ),
            contents=BatchContents(images=needs.images, trajectories=needs.trajectory_points > 0),
            seed=settings.seed, cache_root=settings.output_dir / CACHE_FOLDER, resumes=resumes,
        )  # fmt: skip

    @cached_property
    def optimizer_plugin(self) -> Any:
        """Builds the optimizers."""
        return self.registry.get("optimizer", self.settings.optimizer)(self.config.optimizer)

    @cached_property
    def networks(self) -> Networks:
        """Networks by role, with the weights of ``init_lora`` if one is named."""
        import torch

        from ..engine.networks import Networks

        settings = self.settings
        if self.method.requires(self.config.method, self.method.setup).pixels:
            self.family.load_pixel_decoder()
        with working("making the networks that are trained"):
            networks = Networks(
                self.family, self.method.roles(self.method.config, self.method.setup), lora=adapter_shape(self.config),
                seed=settings.seed, gradient_checkpointing=settings.gradient_checkpointing,
                parameter_dtype=getattr(torch, self.optimizer_plugin.parameter_dtype),
                ema_decay=settings.ema_decay if self._averages_student() else None,
                merging=settings.merge_for_inference == "auto" and not self.strategy.lockstep,
            )  # fmt: skip
            if settings.init_lora:
                networks.start_from("student", str(settings.init_lora))
        return networks

    def _place(self) -> None:
        """Bring the networks into the form that the strategy trains; every process must call it."""
        if self.strategy.lockstep:
            require_same_weights(self.processes, self.networks)
        self.strategy.place(self.networks, self.family)

    @cached_property
    def planned_memory(self) -> MemorySettings | None:
        """The sizes that the run's memory depends on, known before its networks are made; activations are rough."""
        from .planned_memory import planned_memory

        return planned_memory(self.config, self.registry, family=self.family, activations=False)

    @cached_property
    def compilation(self) -> Compilation:
        """The compiler of the networks; raises UserError where what is asked for cannot be compiled."""
        from ..engine.compilation import Compilation, CompileSettings

        settings = self.settings
        asked = CompileSettings(
            mode=settings.compile, gradient_checkpointing=settings.gradient_checkpointing,
            dropout=settings.lora_dropout, quantised=settings.frozen_base_precision != "no_change",
            lockstep=self.strategy.lockstep, memory_budget=settings.activation_memory_budget,
        )  # fmt: skip
        return Compilation(asked, self.processes.device)

    def check_products(self) -> None:
        """Raise UserError where products are to be computed in fp8 and cannot be."""
        from ..engine.fp8_training import check_fp8

        if self.settings.fp8_training:
            check_fp8(
                self.processes.device, model_type=self.settings.model_type,
                mixed_precision=self.settings.mixed_precision, lockstep=self.strategy.lockstep,
            )  # fmt: skip

    def _averages_student(self) -> bool:
        roles = {role.name: role for role in self.method.roles(self.method.config, self.method.setup)}
        if self.settings.use_ema and roles[self.method.result_role()].ema_of is not None:
            logger.info(f"use_ema has no effect: what {self.method.name} exports here is an average already")
            return False
        return self.settings.use_ema

    @cached_property
    def validator(self) -> Validator | None:
        """Makes validation images; None when validation is off."""
        from ..evaluation.validation import ValidationPlan, Validator

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
    def scorer(self) -> ValidationScorer | None:
        """Scores the student at each validation; None where that is not asked for."""
        from ..evaluation.evaluate_run import ComparisonData
        from ..evaluation.evaluators import scores_validations
        from ..evaluation.validation_scores import ValidationScorer

        validator, settings = self.validator, self.settings
        if validator is None or not scores_validations(settings):
            return None
        prompts = self.data.captions(settings.validation_scores_num_samples) or self.prompts
        return ValidationScorer(
            self.config, self.registry, self.family, student=validator.plan.student,
            data=ComparisonData(prompts, self.data.real_images), resolution=self.resolution,
            writes=self.processes.main,
        )  # fmt: skip

    @cached_property
    def prompts(self) -> Sequence[str]:
        """Validation prompts, or captions of the data."""
        return self.config.validation_prompts or self.data.captions(4)

    @cached_property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of images where the run names none."""
        if self.settings.validation_resolution:
            return self.settings.validation_resolution[0]
        return self.data.resolution

    def sampler(self, steps: int | None = None, guidance: float | None = None) -> Sampler:
        """The method's sampler, at the validation's steps and guidance unless others are given."""
        from ..engine.returned import sampler_of

        steps = steps or self.settings.validation_num_inference_steps
        guidance = self.settings.validation_guidance if guidance is None else guidance
        return sampler_of(self.method, self.family.schedule, num_inference_steps=steps, guidance_scale=guidance)

    @cached_property
    def trackers(self) -> Any:
        """Where the run is watched; none on ranks other than the first."""
        from ..engine.tracking import build_trackers

        names = self.settings.report_to if self.processes.main else ()
        trackers, warnings = build_trackers(self.registry, names, self.config.trackers)
        for line in warnings:
            logger.warning(line)
        return trackers

    @cached_property
    def publishers(self) -> Publishers:
        """Where the student goes at the end."""
        from .publishing import build_publishers

        publishers, warnings = build_publishers(self.registry, self.config)
        for line in warnings:
            logger.warning(line)
        return publishers

    def _optimizer(self, role: str) -> RoleOptimizer:
        from ..engine.lr import lr_lambda, staged
        from .optimizers import of_role, own_learning_rate

        settings, plugin = self.settings, self.optimizer_plugin
        declared = self.networks.roles[role]
        chosen, max_grad_norm = of_role(declared, settings, type(plugin))
        follows = own_learning_rate(declared, settings, type(plugin)) is None
        schedule = "constant" if plugin.schedule_free else settings.lr_scheduler
        fp16 = settings.mixed_precision == "fp16"
        return self.strategy.optimizer(
            role, self.networks, lambda parameters: plugin.build(parameters, chosen),
            learning_rate=chosen.learning_rate,
            schedule=staged(
                lambda num_steps: lr_lambda(
                    schedule, settings.lr_warmup_steps, num_steps, num_cycles=settings.lr_num_cycles,
                    power=settings.lr_power, end_factor=settings.lr_end / settings.learning_rate,
                ),
                self.stages, learning_rate=settings.learning_rate if follows else None,
            ),
            max_grad_norm=max_grad_norm, update_policy=plugin,
            scaler=self.strategy.scaler(role, self.networks) if fp16 else None,
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
    def stages(self) -> Sequence[Stage]:
        """The method's parts of this run."""
        stages = self.method.stages(self.method.config, total_steps=self.total_steps)
        assert sum(stage.num_steps for stage in stages) == self.total_steps, "stages must fill the run"
        self._check_rates(stages)
        return stages

    def _check_rates(self, stages: Sequence[Stage]) -> None:
        """Compare the learning rates of stages with the optimizer, and their lengths with the warm-up."""
        from ..engine.lr import segments

        named = [stage.name for stage in stages if stage.learning_rate is not None]
        if named and self.optimizer_plugin.estimates_learning_rate:
            raise UserError(
                f"optimizer = {self.settings.optimizer}: it estimates the learning rate by itself, and stages of the "
                f"method name one ({', '.join(named)})",
                "leave learning_rate out of the stages, or choose another optimizer",
            )
        warm_up, parts = self.settings.lr_warmup_steps, segments(stages)
        short = [f"{part.name!r} ({part.num_steps})" for part in parts if len(parts) > 1 and part.num_steps <= warm_up]
        if warm_up and short:
            logger.warning(
                f"lr_warmup_steps = {warm_up} begins anew with each of these stages and is not below their length, so "
                f"that the learning rate never reaches its value there: {', '.join(short)}"
            )

    @cached_property
    def remote_checkpoints(self) -> RemoteCheckpoints | None:
        """The other place that checkpoints are kept in too, if the data file names one; for the main process."""
        from ..engine.remote_checkpoints import RemoteCheckpoints

        entry = next((entry for entry in self.config.caches if entry.dataset_type == "checkpoints"), None)
        if entry is None or not self.processes.main:
            return None
        backend = self.registry.get("data_backend", entry.type)(entry.backend)
        return RemoteCheckpoints(entry.id, backend, limit=self.settings.checkpoints_total_limit)

    def _store(self) -> CheckpointStore:
        from ..engine.checkpoint import CheckpointStore
        from ..engine.remote_checkpoints import MirroredStore

        folder, limit, remote = self.settings.output_dir, self.settings.checkpoints_total_limit, self.remote_checkpoints
        if remote is not None:
            return MirroredStore(folder, limit=limit, remote=remote)
        return CheckpointStore(folder, limit=limit, read_only=not self.processes.main)

    @cached_property
    def trainer(self) -> Trainer:
        """The loop with everything it needs."""
        import torch

        from ..engine.fp8_training import train_in_fp8
        from ..engine.health import HealthMonitor
        from ..engine.loop import Loop
        from ..engine.metrics import MetricsFile
        from ..engine.profile import StepProfile
        from ..engine.trainer import Outputs, Trainer
        from ..plugin_api.context import Context, Runtime
        from ..plugin_api.run_state import RunState

        settings, processes = self.settings, self.processes
        self._place()
        if settings.fp8_training:
            logger.info(f"{train_in_fp8(self.networks, self.family)} linear layers compute in fp8")
        self.compilation.apply(self.networks, self.family, num_steps=self.total_steps)
        autocast = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision]
        context = Context(
            Runtime(
                self.family, self.networks, settings.seed, processes.device, autocast, stages=self.stages,
                average=processes.average, activation_offload=settings.activation_offload,
                partial_pass=self.strategy.partial_pass,
            )
        )  # fmt: skip
        optimizers = {role: self._optimizer(role) for role in self.networks.trained_roles()}
        loop = Loop(
            self.method, context, self.networks, optimizers,
            health=HealthMonitor(
                settings.max_bad_steps, max_bad_share=settings.max_bad_share, gather=processes.gather,
                scaled=settings.mixed_precision == "fp16",
            ),
            reduce=processes.average, stages=self.stages,
        )  # fmt: skip
        networks = {role: self.networks.module(role) for role in self.networks.roles}
        return Trainer(
            settings=settings, loop=loop,
            outputs=Outputs(self._store(), MetricsFile(settings.output_dir / "metrics.jsonl"), self.trackers),
            state=RunState(self.config, settings.output_dir, self.method, self.family, context, networks,
                           main=processes.main),
            registry=self.registry, strategy=self.strategy, stop=self._stop, observer=self._observer,
            identity={"method": settings.distillation_method, "family": settings.model_family,
                      "model": self.family.fingerprint("denoiser"), "data": self.data.fingerprint(),
                      "samples_of_steps": self.data.samples_of_steps},
            total_steps=self.total_steps,
            profile=StepProfile(settings.profile_steps, folder=settings.output_dir / PROFILE_FOLDER,
                                device=processes.device, rank=processes.rank),
        )  # fmt: skip
