"""Any method at work on a random tiny model in float64 (SDXL unless another is named), every update watched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from distill.core.batch import Batch, Pairs
from distill.core.context import Context, Runtime
from distill.core.engine.checkpoint import CheckpointStore
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.lr import lr_lambda, staged
from distill.core.engine.metrics import MetricsFile
from distill.core.engine.optimize import RoleOptimizer
from distill.core.family import LoraSettings, MicroConditioning, ModelSettings
from distill.core.method import MethodSetup
from distill.core.networks import Networks
from distill.core.plugins import Registry
from distill.core.terms.ddim import trailing_walk
from distill.core.training import Trainer
from distill.model_families.sdxl import SDXL
from torch import Tensor

LORA = LoraSettings(rank=4, alpha=8.0)
EDGE = 4
"""Latents along an edge."""
LATENT = (4, EDGE, EDGE)
"""Of SDXL."""
SIZE = 4
"""Samples of a step."""


@dataclass
class Taken:
    """One update as the engine took it.

    Attributes:
        role: Whose it was.
        loss: Mean over the step.
        gradients: Of the role's parameters, before clipping; None where none came.
        moved: Roles whose weights are not bitwise what they were before it.
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
    """A method at work."""

    family: Any
    method: Any
    networks: Networks
    loop: WatchedLoop
    context: Context
    pristine: dict[str, Tensor] = field(default_factory=dict)
    """The base's own weights as they were loaded."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, with what the method needs: pictures, paths of the teacher."""
        needs = self.method.requires(self.method.config, self.method.setup)
        return make_batch(self.family, step, pictures=needs.pictures, points=needs.trajectory_points)

    def run(self, start: int, end: int, *, parts: int = 1) -> None:
        """Optimizer steps `start` to `end`, each over `parts` micro-batches."""
        for step in range(start, end):
            self.loop.step(step, split(self.batch(step), parts))

    def trainer(self, folder: Path) -> Trainer:
        """Saves and resumes as a run does."""
        nothing = SimpleNamespace(main=True, together=nullcontext, step=0)
        return Trainer(
            settings=nothing, loop=self.loop, store=CheckpointStore(folder, limit=None),
            metrics_file=MetricsFile(folder / "metrics.jsonl"), trackers=nothing, state=nothing, registry=Registry(),
            processes=nothing, stop=nothing, validate=nothing, identity={}, total_steps=0,
            on_step=nothing, say=lambda line: None,
        )  # type: ignore[arg-type]  # fmt: skip


def make_trial(
    folder: Path, found: Any, config: Any, model_type: Any, *, total_steps: int = 4, checkpointing: bool = False,
    watching: bool = False, family: Any = None,
) -> Trial:  # fmt: skip
    """A method with these settings; every role is shaken, so that no two of them agree."""
    family = SDXL(SDXL.Config(), ModelSettings(str(folder))) if family is None else family
    setup = MethodSetup(model_type, prediction_type=family.prediction_type)
    stages = found.stages(config, total_steps=total_steps)
    networks = Networks(
        family, found.roles(config, setup), seed=0, parameter_dtype=torch.float64, gradient_checkpointing=checkpointing,
        lora=LORA if model_type == "lora" else None,
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
    return Trial(family, method, networks, loop, context, pristine)


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


def make_batch(family: Any, step: int, *, pictures: bool, points: int = 0) -> Batch:
    """Four samples with prompts of their own; without latents where there are no pictures, with paths where asked."""
    g = torch.Generator().manual_seed(step)
    embeds = family.encode_prompts([f"a red thing number {i + SIZE * step}" for i in range(SIZE)])
    sizes = [(64 + i, 48) for i in range(SIZE)]
    micro = MicroConditioning(sizes, [(i, 0) for i in range(SIZE)], [(8, 8)] * SIZE)
    cond = {name: value.double() for name, value in family.condition(embeds, micro).items()}
    shape = (family.latent_channels, EDGE, EDGE)
    latents = torch.randn(SIZE, *shape, generator=g).double() if pictures else None
    keys, positions = tuple(f"set/{i}" for i in range(SIZE)), tuple(range(SIZE))
    return Batch(latents, cond, keys, positions, latent_shape=shape, pairs=_paths(family, cond, points, g))


def _paths(family: Any, cond: Any, points: int, g: torch.Generator) -> Pairs | None:
    """Paths of nobody's: twice as many points as are needed, so that a method must take its own."""
    if not points:
        return None
    shape = (family.latent_channels, EDGE, EDGE)
    path, data = torch.randn(SIZE, 2 * points + 1, *shape, generator=g).double().split([2 * points, 1], 1)
    return Pairs(path, trailing_walk(family.schedule, 2 * points).times, data[:, 0], cond)


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch as micro-batches at their positions."""
    size = len(batch) // parts
    return [
        replace(
            batch, latents=None if batch.latents is None else batch.latents[rows], keys=batch.keys[rows],
            cond=_rows(batch.cond, rows), positions=batch.positions[rows], pairs=_pairs_of(batch.pairs, rows),
        )
        for rows in (slice(i * size, (i + 1) * size) for i in range(parts))
    ]  # fmt: skip


def _rows(cond: Any, rows: slice) -> Any:
    return {name: value[rows] for name, value in cond.items()}


def _pairs_of(pairs: Pairs | None, rows: slice) -> Pairs | None:
    if pairs is None:
        return None
    return Pairs(pairs.path[rows], pairs.times, pairs.data[rows], _rows(pairs.cond, rows))


def own_weights(networks: Networks) -> dict[str, list[Tensor]]:
    """Role -> copies of the weights that are its own."""
    return {role: [p.detach().clone() for p in networks.named_parameters(role).values()] for role in networks.roles}


def base_weights(networks: Networks) -> dict[str, Tensor]:
    """The base's tensors that belong to no role."""
    owned = {id(p) for role in networks.roles for p in networks.named_parameters(role).values()}
    return {name: t for name, t in networks.base.state_dict(keep_vars=True).items() if id(t) not in owned}


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Bitwise."""
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def held_bytes(networks: Networks) -> int:
    """Memory of all weights, each storage counted once."""
    modules = {id(networks.module(role)): networks.module(role) for role in networks.roles}
    modules[id(networks.base)] = networks.base
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in modules.values()
        for tensor in [*module.parameters(), *module.buffers()]
    }
    return sum(storages.values())
