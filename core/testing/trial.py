"""Runs any method on any family in float64 with the engine's own loop, and watches every update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..engine.checkpoint import CheckpointStore
from ..engine.health import HealthMonitor
from ..engine.loop import Loop
from ..engine.lr import lr_lambda, staged
from ..engine.metrics import MetricsFile
from ..engine.networks import Networks
from ..engine.observer import TrainingObserver
from ..engine.optimize import RoleOptimizer
from ..engine.strategy import Strategy
from ..engine.trainer import Outputs, Trainer
from ..plugin_api.batch import Batch, Trajectories
from ..plugin_api.context import Context, Runtime
from ..plugin_api.family import LoraSettings
from ..plugin_api.method import MethodSetup, Requirements
from ..registry.registry import Registry
from ..utils.strategies import ParallelSettings


@dataclass
class Taken:
    """One update as the engine took it.

    Attributes:
        role: The role that was updated.
        loss: Mean over the step.
        gradients: Gradients of the role's parameters, before clipping; None where there is none.
        moved: Roles whose weights are not bitwise the same as before it.
    """

    role: str
    loss: float
    gradients: list[Tensor | None]
    moved: set[str]


class WatchedLoop(Loop):
    """The engine's loop, which notes every update that it takes."""

    def __init__(self, *args: Any, watching: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watching = watching
        self.taken: list[Taken] = []

    def _take(self, step: int, accumulated: Any, result: Any) -> None:
        before = own_weights(self.networks) if self.watching else {}
        parameters = self.optimizers[accumulated.role].parameters
        gradients = [None if p.grad is None else p.grad.detach().clone() for p in parameters]
        super()._take(step, accumulated, result)
        loss = torch.stack([update.loss for update in accumulated.updates]).mean().item()
        after = own_weights(self.networks) if self.watching else {}
        moved = {role for role in before if not same(before[role], after[role])}
        self.taken.append(Taken(accumulated.role, loss, gradients, moved))


@dataclass
class Trial:
    """A run of a method."""

    family: Any
    method: Any
    networks: Networks
    loop: WatchedLoop
    context: Context
    batch: Callable[[int], Batch]
    """Makes the batch of a step."""
    pristine: dict[str, Tensor] = field(default_factory=dict)
    """The base's own weights as they were loaded."""

    def run(self, start: int, end: int, *, parts: int = 1) -> None:
        """Take optimizer steps `start` to `end`, each over `parts` micro-batches."""
        for step in range(start, end):
            self.loop.step(step, split(self.batch(step), parts))

    def trainer(self, folder: Path) -> Trainer:
        """Return a trainer that saves and resumes as a run does."""
        nothing: Any = SimpleNamespace(main=True, synchronized=nullcontext, step=0, checkpoint_async=False)
        return Trainer(
            settings=nothing, loop=self.loop,
            outputs=Outputs(CheckpointStore(folder, limit=None), MetricsFile(folder / "metrics.jsonl"), nothing),
            state=nothing, registry=Registry(), strategy=Strategy(nothing, ParallelSettings()), stop=nothing,
            observer=TrainingObserver(),
            identity={}, total_steps=0,
        )  # type: ignore[arg-type]  # fmt: skip


def make_trial(
    family: Any, found: Any, config: Any, model_type: Any, *, batch_of: Callable[[Requirements, int], Batch],
    total_steps: int = 4, lora: LoraSettings | None = None, checkpointing: bool = False, watching: bool = False,
) -> Trial:  # fmt: skip
    """Make a method with these settings; every role's weights are perturbed, so that no two of them agree.

    Args:
        family: Makes the networks.
        found: The method's class.
        config: Its settings.
        model_type: The kind of student.
        batch_of: Makes the batch of a step with the data that the method requires.
        total_steps: Total of the method's stages.
        lora: Shape of adapters.
        checkpointing: Recompute activations in the backward pass.
        watching: Whether every update notes which roles it moved.
    """
    setup = MethodSetup(model_type, prediction_type=family.prediction_type)
    stages = found.stages(config, total_steps=total_steps)
    networks = Networks(
        family, found.roles(config, setup), seed=0, parameter_dtype=torch.float64, gradient_checkpointing=checkpointing,
        lora=lora,
    )  # fmt: skip
    networks.base.to(torch.float64)
    pristine = {name: tensor.clone() for name, tensor in base_weights(networks).items()}
    for number, role in enumerate(networks.roles):
        _shake(networks.named_parameters(role), seed=number)
    context = Context(Runtime(family, networks, seed=0, device=torch.device("cpu"), stages=stages))
    method = found(config, setup)
    loop = WatchedLoop(
        method, context, networks, {role: _optimizer(networks, role, stages) for role in networks.trained_roles()},
        health=HealthMonitor(1), stages=stages, watching=watching,
    )  # fmt: skip
    batch = partial(batch_of, found.requires(config, setup))
    return Trial(family, method, networks, loop, context, batch, pristine)


def _optimizer(networks: Networks, role: str, stages: Sequence[Any]) -> RoleOptimizer:
    parameters = networks.parameters(role)
    return RoleOptimizer(
        torch.optim.AdamW(parameters, lr=1e-3), parameters, learning_rate=1e-3, max_grad_norm=1.0,
        schedule=staged(lambda length: lr_lambda("constant", 0, length), stages),
    )  # fmt: skip


@torch.no_grad()
def _shake(parameters: dict[str, Any], *, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        if "lora_A" not in name:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))


def split(batch: Batch, parts: int) -> list[Batch]:
    """Return the batch as micro-batches at their positions."""
    size = len(batch) // parts
    return [
        replace(
            batch, latents=None if batch.latents is None else batch.latents[rows], keys=batch.keys[rows],
            cond=_rows(batch.cond, rows), positions=batch.positions[rows],
            trajectories=_trajectories_of(batch.trajectories, rows),
        )
        for rows in (slice(i * size, (i + 1) * size) for i in range(parts))
    ]  # fmt: skip


def _rows(cond: Any, rows: slice) -> Any:
    return {name: value[rows] for name, value in cond.items()}


def _trajectories_of(trajectories: Trajectories | None, rows: slice) -> Trajectories | None:
    if trajectories is None:
        return None
    return Trajectories(
        trajectories.points[rows], trajectories.times, trajectories.data[rows], _rows(trajectories.cond, rows)
    )


def own_weights(networks: Networks) -> dict[str, list[Tensor]]:
    """Return role -> copies of its own weights."""
    return {role: [p.detach().clone() for p in networks.named_parameters(role).values()] for role in networks.roles}


def base_weights(networks: Networks) -> dict[str, Tensor]:
    """Return the base's tensors that belong to no role."""
    owned = {id(p) for role in networks.roles for p in networks.named_parameters(role).values()}
    return {name: t for name, t in networks.base.state_dict(keep_vars=True).items() if id(t) not in owned}


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Return True if all tensors are bitwise equal."""
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
