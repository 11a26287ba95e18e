"""Noise schedules for every prediction type, and training on data that is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..diffusion import DDPMSchedule, FlowSchedule
from ..diffusion.schedule import Schedule
from ..engine.health import HealthMonitor
from ..engine.loop import Loop
from ..engine.lr import staged
from ..engine.networks import Networks
from ..engine.optimize import RoleOptimizer
from ..plugin_api.batch import Batch
from ..plugin_api.context import Context, Runtime
from ..plugin_api.family import LoraSettings, ModelFamily
from ..plugin_api.method import Method, MethodSetup
from .trial import base_weights

NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The beta schedule of a widespread model."""
TABLE = DDPMSchedule.from_config(NOISE)
ZERO_SNR = DDPMSchedule.from_config({**NOISE, "rescale_betas_zero_snr": True})
PATHS: Mapping[str, tuple[str, Schedule]] = {
    "eps": ("epsilon", TABLE),
    "v": ("v_prediction", TABLE),
    "v-zero-snr": ("v_prediction", ZERO_SNR),
    "x0": ("sample", TABLE),
    "flow": ("flow", FlowSchedule(shift=1.0)),
    "flow-shift": ("flow", FlowSchedule(shift=3.0)),
}
"""Prediction type and schedule by a short name."""


def cosine(length: int) -> Callable[[int], float]:
    """Return a factor that falls from 1 to 0 along half a wave in `length` steps."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / length))


def train(
    method_class: type[Method],
    config: Any,
    family: ModelFamily,
    batch_of: Callable[[int], Batch],
    *,
    num_steps: int,
    lr: float,
    seed: int = 0,
    setup: MethodSetup | None = None,
    context_class: type[Context] = Context,
    lora: LoraSettings | None = None,
) -> tuple[Method, Networks, Context]:
    """Train a method; return (method, networks, context) after `num_steps` steps, with the teacher bitwise unchanged.

    Args:
        method_class: The method to train.
        config: Its settings.
        family: Makes the networks, in float64.
        batch_of: Makes the batch of a step.
        num_steps: Number of optimizer steps.
        lr: Adam's learning rate for every role; falls along a cosine to 0 in every stage that restarts it.
        seed: Seed of networks and draws.
        setup: The facts of the run that the method may use.
        context_class: Class of the method's context.
        lora: Shape of adapters.
    """
    setup = setup or MethodSetup("full")
    method = method_class(config, setup)
    stages = method.stages(config, total_steps=num_steps)
    networks = Networks(family, method.roles(config, setup), lora=lora, seed=seed, parameter_dtype=torch.float64)
    before = {name: value.clone() for name, value in base_weights(networks).items()}
    context = context_class(Runtime(family, networks, seed=seed, device=torch.device("cpu"), stages=stages))
    optimizers = {}
    for role in networks.trained_roles():
        parameters = networks.parameters(role)
        adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
        optimizers[role] = RoleOptimizer(
            adam, parameters, learning_rate=lr, schedule=staged(cosine, stages), max_grad_norm=0
        )
    loop = Loop(method, context, networks, optimizers, health=HealthMonitor(1), stages=stages)
    for step in range(num_steps):
        loop.step(step, [batch_of(step)])
    for name, value in base_weights(networks).items():
        assert torch.equal(value, before[name]), "the teacher has changed"
    return method, networks, context
