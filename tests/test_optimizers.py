"""Each optimizer descends, resumes bit for bit and honours what it says it honours."""

import copy
import json

import pytest
import torch
from distill.core.engine.checkpoint import load_optimizer, optimizer_to_tensors, tensors_to_optimizer
from distill.core.optimizer import OptimizerPlugin, OptimizerSettings
from distill.plugins.optimizers import register_optimizers

PLUGINS = {plugin.name: plugin for plugin in register_optimizers()}
SETTINGS = OptimizerSettings(learning_rate=1e-2, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)
each = pytest.mark.parametrize("plugin", list(PLUGINS.values()), ids=list(PLUGINS))


def parameters(plugin: type[OptimizerPlugin], seed: int = 0) -> list[torch.nn.Parameter]:
    draws = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, plugin.parameter_dtype)
    return [torch.nn.Parameter(torch.randn(shape, generator=draws).to(dtype)) for shape in ((8, 4), (4,))]


def step(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One step of a noisy quadratic around 0."""
    noise = torch.Generator().manual_seed(seed)
    loss = sum((w.float() + 0.1 * torch.randn(w.shape, generator=noise)).square().sum() for w in weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@each
def test_descends(plugin: type[OptimizerPlugin]) -> None:
    weights = parameters(plugin)
    optimizer = plugin(plugin.Config()).build(weights, SETTINGS)
    losses = [step(weights, optimizer, seed) for seed in range(300)]
    assert losses[-1] < 0.1 * losses[0]


@each
def test_resumes_bit_for_bit(plugin: type[OptimizerPlugin]) -> None:
    weights = parameters(plugin)
    optimizer = plugin(plugin.Config()).build(weights, SETTINGS)
    for seed in range(7):
        step(weights, optimizer, seed)
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    tensors, meta = optimizer_to_tensors(optimizer.state_dict())
    resumed = plugin(plugin.Config()).build(copies, SETTINGS)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    load_optimizer(resumed, tensors_to_optimizer(saved, json.loads(json.dumps(meta, allow_nan=False))))
    for seed in range(7, 40):
        assert step(weights, optimizer, seed) == step(copies, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


@each
def test_every_key_that_is_honoured_changes_the_outcome_and_no_other_does(plugin: type[OptimizerPlugin]) -> None:
    def outcome(settings: OptimizerSettings) -> torch.Tensor:
        weights = parameters(plugin)
        optimizer = plugin(plugin.Config()).build(weights, settings)
        for seed in range(20):
            step(weights, optimizer, seed)
        return torch.cat([weight.detach().float().flatten() for weight in weights])

    changes = {"beta1": 0.5, "beta2": 0.9, "epsilon": 0.5, "weight_decay": 0.5}
    base = outcome(SETTINGS)
    for field, value in changes.items():
        changed = outcome(OptimizerSettings(**{**vars(SETTINGS), field: value}))
        assert (f"adam_{field}" in plugin.honours) == (not torch.equal(base, changed)), field


def test_adamw_is_torchs_and_fused() -> None:
    weights = parameters(PLUGINS["adamw"])
    optimizer = PLUGINS["adamw"](OptimizerPlugin.Config()).build(weights, SETTINGS)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["fused"]
    others = copy.deepcopy(weights)
    plain = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False)
    for seed in range(30):
        step(weights, optimizer, seed)
        step(others, plain, seed)
    for mine, reference in zip(weights, others, strict=True):
        torch.testing.assert_close(mine, reference)


def test_optimi_adamw_follows_torchs() -> None:
    weights, others = parameters(PLUGINS["adamw"]), parameters(PLUGINS["adamw"])
    optimizer = PLUGINS["optimi-adamw"](PLUGINS["optimi-adamw"].Config()).build(weights, SETTINGS)
    plain = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.01)
    for seed in range(100):
        step(weights, optimizer, seed)
        step(others, plain, seed)
    for mine, reference in zip(weights, others, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)


def test_bf16_weights_take_steps_smaller_than_their_rounding() -> None:
    """1,000 steps of 1e-5 move a weight of 1 by about 0.01; plain bfloat16 would not (its spacing is 0.0039)."""
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    settings = OptimizerSettings(learning_rate=1e-5, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
    optimizer = PLUGINS["adamw_bf16"](OptimizerPlugin.Config()).build([weight], settings)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = weight.detach().double() + optimizer.state[weight]["kahan_comp"].double()
    # The compensation is itself in bfloat16, which costs a tenth of the way.
    torch.testing.assert_close(moved, torch.full((64,), 0.99, dtype=torch.float64), rtol=0, atol=1.5e-3)


def test_bf16_second_moment_follows_gradients_that_shrink() -> None:
    """In bfloat16 it would stay where it was after 500 steps: 0.999 v rounds to v."""
    weight = torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    optimizer = PLUGINS["adamw_bf16"](OptimizerPlugin.Config()).build([weight], SETTINGS)
    draws, expected = torch.Generator().manual_seed(0), 0.0
    for number in range(4000):
        scale = 1.0 if number < 1000 else 0.1
        weight.grad = (scale * torch.randn(512, generator=draws)).bfloat16()
        optimizer.step()
        expected = 0.999 * expected + 0.001 * scale**2
    assert optimizer.state[weight]["exp_avg_sq"].mean().item() == pytest.approx(expected, rel=0.1)


@each
def test_libraries_are_named_as_pip_knows_them(plugin: type[OptimizerPlugin]) -> None:
    import importlib.metadata
    import importlib.util

    for module, distribution in plugin.packages.items():
        assert importlib.util.find_spec(module)
        assert importlib.metadata.version(distribution)


def test_moments_of_channels_last_weights_resume_bit_for_bit():
    """A fused kernel walks over memory: moments must lie as their weights do, also after a checkpoint's round trip."""
    from distill.core.engine.tree import load_optimizer, optimizer_to_tensors, tensors_to_optimizer

    def make():
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def step(layer, optimizer, seed):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        (layer(x) ** 2).mean().backward()
        optimizer.step()

    layer, optimizer = make()
    step(layer, optimizer, 1)
    tensors, meta = optimizer_to_tensors(optimizer.state_dict())
    stored = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    again, resumed = make()
    again.load_state_dict(layer.state_dict())
    load_optimizer(resumed, tensors_to_optimizer(stored, meta))
    for seed in (2, 3):
        step(layer, optimizer, seed)
        step(again, resumed, seed)
    assert torch.equal(layer.weight, again.weight)
