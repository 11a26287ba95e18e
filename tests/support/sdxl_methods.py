"""A random tiny SDXL with the roles, stages and loop of any method, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.lr import lr_lambda, staged
from distill.core.engine.networks import Networks
from distill.core.engine.processes import Processes
from distill.core.engine.strategy import Strategy
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import LoraSettings, ModelSettings
from distill.core.plugin_api.method import MethodSetup
from distill.core.utils.strategies import ParallelSettings
from distill.model_families.sdxl import SDXL


@dataclass
class Parts:
    """A method at work on SDXL."""

    family: Any
    method: Any
    networks: Networks
    context: Context
    loop: Loop


def make_parts(
    method_class: Any, folder: Any, *, model_type: Any = "lora", use_ema: bool = False, total_steps: int = 6,
    scheduler: str = "linear", shaken: bool = True, checkpointing: bool = False, strategy: Any = None,
    dtype: torch.dtype = torch.float64, **config: Any,
) -> Parts:  # fmt: skip
    """Everything for `total_steps` engine steps; what is trained and its copies differ from the base if `shaken`.

    With a `strategy`, its processes share the networks.
    """
    family = SDXL(SDXL.Config(), ModelSettings(str(folder)))
    setup = MethodSetup(model_type, prediction_type=family.prediction_type, use_ema=use_ema)
    method = method_class(method_class.Config(**config), setup)
    stages = method.stages(method.config, total_steps=total_steps)
    networks = Networks(
        family, method.roles(method.config, setup), seed=0, parameter_dtype=dtype,
        lora=LoraSettings(rank=4, alpha=8.0) if model_type == "lora" else None, ema_decay=0.9 if use_ema else None,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    networks.base.to(dtype)
    for number, (name, role) in enumerate(networks.roles.items()):
        if shaken and (role.trains != "none" or role.copy_of is not None):
            _shake(networks.named_parameters(name), seed=number)
    networks.restart_averages()
    strategy = strategy or Strategy(Processes("cpu"), ParallelSettings())
    strategy.place(networks, family)
    average = strategy.processes.average
    runtime = Runtime(family, networks, seed=0, device=torch.device("cpu"), stages=stages, average=average,
                      partial_pass=strategy.partial_pass)  # fmt: skip
    context = Context(runtime)
    optimizers = {
        role: strategy.optimizer(
            role, networks, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), learning_rate=1e-3,
            max_grad_norm=1.0, schedule=staged(lambda length: lr_lambda(scheduler, 0, length), stages),
        )
        for role in networks.trained_roles()
    }  # fmt: skip
    loop = Loop(method, context, networks, optimizers, health=HealthMonitor(3), stages=stages, reduce=average)
    return Parts(family, method, networks, context, loop)


@torch.no_grad()
def _shake(parameters: dict[str, torch.nn.Parameter], *, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        if "lora_A" not in name:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))


def table() -> torch.Tensor:
    """SDXL's cumulative alphas, made here by numpy."""
    return torch.from_numpy(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))


def call(networks: Networks, role: str, x: torch.Tensor, t: torch.Tensor, cond: dict, *, prompt=True, w=None):
    """The raw UNet of a role, (B, C, h, w), with nothing of the family's or the diffusion core's in between."""
    keep = 1.0 if prompt else 0.0
    extra = {}
    if w is not None:
        frequency = torch.exp(torch.arange(128).double() * -(np.log(10000.0) / 127))
        angle = 1000.0 * w.double()[:, None] * frequency[None]
        extra = {"timestep_cond": torch.cat([angle.sin(), angle.cos()], 1)}
    with networks.use(role) as unet:
        return unet(
            x, t, encoder_hidden_states=keep * cond["prompt_embeds"],
            added_cond_kwargs={"text_embeds": keep * cond["pooled_prompt_embeds"], "time_ids": cond["time_ids"]},
            **extra,
        ).sample  # fmt: skip


def loss_and_gradients(parts: Parts, loss: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """The loss and its gradient in the student."""
    return loss.item(), list(torch.autograd.grad(loss, parts.networks.parameters("student")))
