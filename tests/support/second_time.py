"""A tiny SDXL whose roles take a second time that does something."""

from __future__ import annotations

import torch
from distill.core.plugin_api.family import MicroConditioning, ModelSettings
from distill.model_families.sdxl import SDXL
from support.tiny_sdxl import EDGE

PROMPTS = ["a red fox", "two boats"]
SEEDS = [3, 8]
SIZE = {"width": EDGE, "height": EDGE}


def make(folder, config=None, **settings):
    return SDXL(SDXL.Config(**(config or {})), ModelSettings(source=str(folder), **settings))


def trained(module, *, seed=0, std=0.05):
    """The module with every weight random, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def add_lora(network, name, *, seed=0, std=0.05):
    """An adapter that does something."""
    from distill.model_families.bases.unet import LORA_TARGETS
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(LoraConfig(r=4, lora_alpha=8.0, target_modules=list(LORA_TARGETS)), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in network.named_parameters():
        if f".{name}." in key and "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
    return network


def lora_student(family, name="student", *, seed=0):
    """The teacher's base with an adapter and a second time, both as after training."""
    network = add_lora(family.load_network(), name, seed=seed)
    trained(family.add_second_time(network, name=name), seed=seed + 100, std=0.3)
    return network


def full_student(family, *, seed=0):
    """A fully trained student with a second time."""
    network = family.student_network(family.load_network(), guidance_embedding=False, second_time=True)
    trained(network.second_time, seed=seed + 100, std=0.3)
    return network


def inputs(family, size=2, *, dtype=torch.float32, seed=0):
    """(x_t, t, r, cond) in the network's time units."""
    generator = torch.Generator().manual_seed(seed)
    embeds = family.encode_prompts([f"a red thing number {i}" for i in range(size)])
    micro = MicroConditioning([(64, 48)] * size, [(0, 0)] * size, [(32, 32)] * size)
    cond = {name: value.to(dtype) for name, value in family.condition(embeds, micro).items()}
    x_t = torch.randn(size, family.latent_channels, 8, 8, generator=generator).to(dtype)
    t = torch.linspace(400, 900, size, dtype=dtype)
    return x_t, t, t / 2 + 0.25, cond
