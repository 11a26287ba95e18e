"""A random tiny SDXL with a LoRA student, ready for engine steps."""

from __future__ import annotations

import torch
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.plugin_api.batch import Batch
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import LoraSettings, MicroConditioning, ModelSettings
from distill.core.plugin_api.method import MethodSetup
from distill.distill_methods.lcm import LCM
from distill.model_families.sdxl import SDXL


def make_setup(folder, *, model_type="lora", dtype=torch.float64, checkpointing=False, seed=0, random_b=True, **config):
    """(family, method, networks, context) on the model in `folder`; LoRA B random so that it does something."""
    family = SDXL(SDXL.Config(), ModelSettings(str(folder)))
    method = LCM(LCM.Config(**{"w_min": 2.0, "w_max": 6.0, **config}), MethodSetup(model_type))
    lora = LoraSettings(rank=4, alpha=8.0) if model_type == "lora" else None
    networks = Networks(
        family, method.roles(method.config, method.setup), lora=lora, seed=seed, gradient_checkpointing=checkpointing,
        parameter_dtype=dtype,
    )  # fmt: skip
    networks.base.to(dtype)
    if model_type == "lora" and random_b:
        g = torch.Generator().manual_seed(5)
        for name, parameter in networks.named_parameters("student").items():
            if "lora_B" in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=g))
    context = Context(Runtime(family, networks, seed=seed, device=torch.device("cpu")))
    return family, method, networks, context


def make_batch(family, size=4, *, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    embeds = family.encode_prompts([f"a red thing number {i}" for i in range(size)])
    sizes = [(64 + i, 48) for i in range(size)]
    micro = MicroConditioning(sizes, [(i, 0) for i in range(size)], [(32, 32)] * size)
    cond = {name: value.to(dtype) for name, value in family.condition(embeds, micro).items()}
    latents = torch.randn(size, family.latent_channels, 8, 8, generator=g).to(dtype)
    return Batch(latents, cond, tuple(f"set/{i}" for i in range(size)), tuple(range(size)))


def split(batch, parts):
    """The batch as `parts` micro-batches at their positions."""
    n = len(batch) // parts
    cut = [slice(i * n, (i + 1) * n) for i in range(parts)]
    return [
        Batch(batch.latents[s], {k: v[s] for k, v in batch.cond.items()}, batch.keys[s], batch.positions[s])
        for s in cut
    ]


def make_loop(method, networks, context, *, lr=1e-3):
    parameters = networks.parameters("student")
    adam = torch.optim.AdamW(parameters, lr=lr)
    optimizer = RoleOptimizer(adam, parameters, learning_rate=lr, schedule=lambda step: 1.0, max_grad_norm=1.0)
    return Loop(method, context, networks, {"student": optimizer}, health=HealthMonitor(3))
