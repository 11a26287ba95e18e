"""Any method at work on a random tiny model in float64 (SDXL unless another is named), every update watched."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from distill.core.diffusion.solvers import trailing_timesteps
from distill.core.engine.networks import Networks
from distill.core.plugin_api.batch import Batch, Trajectories
from distill.core.plugin_api.family import LoraSettings, MicroConditioning, ModelSettings
from distill.core.testing import trial
from distill.model_families.sdxl import SDXL

LORA = LoraSettings(rank=4, alpha=8.0)
EDGE = 4
"""Latents along an edge."""
LATENT = (4, EDGE, EDGE)
"""Of SDXL."""
SIZE = 4
"""Samples of a step."""


def make_trial(folder: Path, found: Any, config: Any, model_type: Any, *, family: Any = None, **settings: Any) -> Any:
    """A method with these settings; every role is shaken, so that no two of them agree."""
    family = SDXL(SDXL.Config(), ModelSettings(str(folder))) if family is None else family
    batch_of = partial(_batch, family)
    return trial.make_trial(family, found, config, model_type, batch_of=batch_of, lora=LORA, **settings)


def _batch(family: Any, needs: Any, step: int) -> Batch:
    return make_batch(family, step, images=needs.images, points=needs.trajectory_points)


def make_batch(family: Any, step: int, *, images: bool, points: int = 0) -> Batch:
    """Four samples with prompts of their own; without latents where there are no images, with paths where asked."""
    g = torch.Generator().manual_seed(step)
    embeds = family.encode_prompts([f"a red thing number {i + SIZE * step}" for i in range(SIZE)])
    sizes = [(64 + i, 48) for i in range(SIZE)]
    micro = MicroConditioning(sizes, [(i, 0) for i in range(SIZE)], [(8, 8)] * SIZE)
    cond = {name: value.double() for name, value in family.condition(embeds, micro).items()}
    shape = (family.latent_channels, EDGE, EDGE)
    latents = torch.randn(SIZE, *shape, generator=g).double() if images else None
    keys, positions = tuple(f"set/{i}" for i in range(SIZE)), tuple(range(SIZE))
    return Batch(latents, cond, keys, positions, latent_shape=shape, trajectories=_paths(family, cond, points, g))


def _paths(family: Any, cond: Any, points: int, g: torch.Generator) -> Trajectories | None:
    """Paths of nobody's: twice as many points as are needed, so that a method must take its own."""
    if not points:
        return None
    shape = (family.latent_channels, EDGE, EDGE)
    path, data = torch.randn(SIZE, 2 * points + 1, *shape, generator=g).double().split([2 * points, 1], 1)
    return Trajectories(path, trailing_timesteps(family.schedule, 2 * points).times, data[:, 0], cond)


def held_bytes(networks: Networks) -> int:
    """Memory of all weights, each storage counted once, but for auxiliary networks, which come from elsewhere."""
    roles = [name for name, role in networks.roles.items() if not role.auxiliary]
    modules = {id(networks.module(role)): networks.module(role) for role in roles}
    modules[id(networks.base)] = networks.base
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in modules.values()
        for tensor in [*module.parameters(), *module.buffers()]
    }
    return sum(storages.values())
