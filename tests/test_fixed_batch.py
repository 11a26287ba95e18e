"""On one batch with fixed draws, every optimizer and every quantised base brings the loss of an LCM down."""

from __future__ import annotations

import pytest
import torch
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import LoraSettings, ModelSettings
from distill.core.plugin_api.method import MethodSetup
from distill.core.plugin_api.optimizer import OptimizerSettings
from distill.core.plugin_api.precision import BASE, Precisions
from distill.core.registry.registry import Registry
from distill.distill_methods.lcm import LCM
from distill.model_families.sdxl import SDXL
from support.sdxl_setup import make_batch
from support.tiny_sdxl import write_tiny_sdxl

REGISTRY = Registry.load(installed=False)
NUM_STEPS = 12
FALL = 0.8
"""What the loss is to be multiplied by in so many steps, at most."""
RATES = {"lion": 2e-3, "optimi-lion": 2e-3, "bnb-lion8bit": 2e-3}
"""Learning rates other than 0.01."""
OPTIONS = {"prodigy": {"d0": 1e-3}, "soap": {"precondition_frequency": 3}, "int4-torchao": {"group_size": 16}}
SLOW = ("ao-adamw8bit", "ao-adamw4bit")
"""They compile for half a minute."""
optimizers = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in REGISTRY.names("optimizer")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl"), layers_per_block=1)


def build(model, optimizer="adamw", quantizer=None):
    """(loop, batch) of an LCM whose LoRA already does something."""
    precision = Precisions()
    if quantizer:
        found = REGISTRY.get("quantizer", quantizer)
        precision = Precisions({BASE: found(found.Config(**OPTIONS.get(quantizer, {})))})
    plugin = REGISTRY.get("optimizer", optimizer)
    plugin = plugin(plugin.Config(**OPTIONS.get(optimizer, {})))
    family = SDXL(SDXL.Config(), ModelSettings(str(model), precision=precision))
    method = LCM(LCM.Config(w_min=2.0, w_max=2.0), MethodSetup("lora"))
    networks = Networks(
        family, method.roles(method.config, method.setup), lora=LoraSettings(4, 8.0), seed=0,
        parameter_dtype=getattr(torch, plugin.parameter_dtype),
    )  # fmt: skip
    context = Context(Runtime(family, networks, seed=0, device=torch.device("cpu")))
    parameters = networks.parameters("student")
    rate = plugin.default_learning_rate or RATES.get(optimizer, 1e-2)
    stepped = plugin.build(parameters, OptimizerSettings(rate, 0.9, 0.999, 1e-8, 0.0))
    role = RoleOptimizer(
        stepped, parameters, learning_rate=rate, schedule=lambda step: 1.0, max_grad_norm=1.0, update_policy=plugin
    )
    loop = Loop(method, context, networks, {"student": role}, health=HealthMonitor(3))
    return loop, make_batch(family, 2, dtype=torch.float32)


def fall(loop, batch):
    """Last loss by first loss; every step is the first one, with its draws."""
    losses = [float(loop.step(0, [batch]).metrics["loss"]) for _ in range(NUM_STEPS)]
    return losses[-1] / losses[0]


@pytest.mark.parametrize("name", optimizers)
def test_every_optimizer_brings_the_loss_down(name, model):
    assert fall(*build(model, optimizer=name)) < FALL


@pytest.mark.parametrize("name", REGISTRY.names("quantizer"))
def test_a_lora_on_every_quantised_base_brings_the_loss_down(name, model):
    assert fall(*build(model, quantizer=name)) < FALL


def test_an_optimizer_that_does_nothing_fails(model, monkeypatch):
    loop, batch = build(model)
    monkeypatch.setattr(loop.optimizers["student"].optimizer, "step", lambda: None)
    assert fall(loop, batch) == 1.0
