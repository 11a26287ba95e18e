"""Each optimizer descends, resumes bit for bit and honours what it says it honours."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from distill.core.engine.optimize import RoleOptimizer
from distill.core.plugin_api.optimizer import OptimizerPlugin, OptimizerSettings
from distill.core.registry.registry import Registry
from distill.core.utils.tensor_tree import optimizer_to_tensors, tensors_to_optimizer

REGISTRY = Registry.load(installed=False)
PLUGINS = {name: REGISTRY.get("optimizer", name) for name in REGISTRY.names("optimizer")}
COMPILED = ("ao-adamw8bit", "ao-adamw4bit")
"""Their first step takes half a minute."""
SHAPES = ((8, 4), (4,), (4, 3, 3, 3), (64, 128))
"""A matrix, a vector, a convolution, and a matrix large enough for 8-bit moments."""
SETTINGS = OptimizerSettings(learning_rate=1e-2, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)
each = pytest.mark.parametrize(
    "plugin",
    [
        pytest.param(plugin, id=name, marks=pytest.mark.slow if name in COMPILED else ())
        for name, plugin in PLUGINS.items()
    ],
)


def parameters(plugin: type[OptimizerPlugin], seed: int = 0, shapes=((8, 4), (4,))) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, plugin.parameter_dtype)
    return [torch.nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in shapes]


def wrapped(plugin: type[OptimizerPlugin], weights: list[torch.nn.Parameter], **changes) -> RoleOptimizer:
    """As the engine has it."""
    built, rate = plugin(plugin.Config()), plugin.default_learning_rate or SETTINGS.learning_rate
    optimizer = built.build(weights, replace(SETTINGS, learning_rate=rate, **changes))
    return RoleOptimizer(
        optimizer, weights, learning_rate=rate, schedule=lambda step: 1.0, max_grad_norm=0, update_policy=built
    )


def loss_of(weights: list[torch.nn.Parameter], seed: int) -> torch.Tensor:
    """A noisy quadratic around 0."""
    noise = torch.Generator().manual_seed(seed)
    return sum((w.float() + 0.1 * torch.randn(w.shape, generator=noise)).square().sum() for w in weights)


def step(weights: list[torch.nn.Parameter], optimizer, seed: int) -> float:
    """One step, by the engine's wrapper or by the bare optimizer."""
    loss = loss_of(weights, seed)
    if isinstance(optimizer, RoleOptimizer):
        optimizer.backward(loss)
        optimizer.step(seed)
        return loss.item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@each
def test_every_optimizer_brings_the_loss_down(plugin: type[OptimizerPlugin]) -> None:
    weights = parameters(plugin)
    optimizer = wrapped(plugin, weights)
    losses = [step(weights, optimizer, seed) for seed in range(300)]
    assert losses[-1] < 0.25 * losses[0]


def reloaded(plugin, weights, optimizer) -> tuple[list[torch.nn.Parameter], RoleOptimizer]:
    """Copies with an optimizer that has been through a checkpoint."""
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    tensors, meta = optimizer_to_tensors(optimizer.state_dict())
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = wrapped(plugin, copies)
    resumed.load_state_dict(tensors_to_optimizer(saved, json.loads(json.dumps(meta, allow_nan=False))))
    return copies, resumed


@each
def test_every_optimizer_resumes_bit_for_bit(plugin: type[OptimizerPlugin]) -> None:
    weights = parameters(plugin, shapes=SHAPES)
    optimizer = wrapped(plugin, weights)
    for seed in range(7):
        step(weights, optimizer, seed)
    copies, resumed = reloaded(plugin, weights, optimizer)
    for seed in range(7, 30):
        assert step(weights, optimizer, seed) == step(copies, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


@each
def test_looking_at_the_weights_to_evaluate_changes_nothing(plugin: type[OptimizerPlugin]) -> None:
    weights, others = parameters(plugin), parameters(plugin)
    optimizer, undisturbed = wrapped(plugin, weights), wrapped(plugin, others)
    for seed in range(20):
        step(weights, optimizer, seed)
        step(others, undisturbed, seed)
        with optimizer.evaluating():
            loss_of(weights, seed)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@each
def test_reset_forgets_everything(plugin: type[OptimizerPlugin]) -> None:
    weights = parameters(plugin)
    optimizer = wrapped(plugin, weights)
    for seed in range(5):
        step(weights, optimizer, seed)
    optimizer.reset()
    others = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    fresh = wrapped(plugin, others)
    for seed in range(5):
        assert step(weights, optimizer, seed) == step(others, fresh, seed)


def test_schedule_free_is_evaluated_at_its_average() -> None:
    """By the paper: x is the mean of the iterates z, and gradients are taken between x and z."""
    plugin = PLUGINS["schedulefree-adamw"]
    weights = parameters(plugin)
    optimizer = wrapped(plugin, weights, weight_decay=0.0)
    iterates = []
    for seed in range(50):
        step(weights, optimizer, seed)
        iterates.append([optimizer.optimizer.state[weight]["z"].clone() for weight in weights])
    held = [weight.detach().clone() for weight in weights]
    with optimizer.evaluating():
        average = [torch.stack(column).mean(0) for column in zip(*iterates, strict=True)]
        for weight, expected in zip(weights, average, strict=True):
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)
    optimizer.finalize()
    assert not any(torch.equal(a, b) for a, b in zip(weights, held, strict=True))


def test_muon_is_for_matrices_alone() -> None:
    plugin = PLUGINS["muon"]
    weights = parameters(plugin, shapes=SHAPES)
    optimizer = wrapped(plugin, weights)
    step(weights, optimizer, 0)
    kinds = ["momentum_buffer" in optimizer.optimizer.state[weight] for weight in weights]
    assert kinds == [True, False, False, True]


def test_prodigy_finds_its_own_steps() -> None:
    plugin = PLUGINS["prodigy"]
    weights = parameters(plugin)
    optimizer = wrapped(plugin, weights)
    for seed in range(60):
        step(weights, optimizer, seed)
    assert optimizer.optimizer.param_groups[0]["d"] > 100 * plugin.Config().d0


@each
def test_every_key_that_is_honoured_changes_the_outcome_and_no_other_does(plugin: type[OptimizerPlugin]) -> None:
    def outcome(settings: OptimizerSettings) -> torch.Tensor:
        weights = parameters(plugin)
        rate = plugin.default_learning_rate or settings.learning_rate
        optimizer = plugin(plugin.Config()).build(weights, replace(settings, learning_rate=rate))
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
    rng, expected = torch.Generator().manual_seed(0), 0.0
    for number in range(4000):
        scale = 1.0 if number < 1000 else 0.1
        weight.grad = (scale * torch.randn(512, generator=rng)).bfloat16()
        optimizer.step()
        expected = 0.999 * expected + 0.001 * scale**2
    assert optimizer.state[weight]["exp_avg_sq"].mean().item() == pytest.approx(expected, rel=0.1)


@each
def test_libraries_are_named_as_pip_knows_them(plugin: type[OptimizerPlugin]) -> None:
    import importlib.metadata
    import importlib.util
    import re

    for module, distribution in plugin.packages.items():
        assert importlib.util.find_spec(module)
        assert importlib.metadata.version(re.split(r"[<>=]", distribution)[0])


def test_moments_of_channels_last_weights_resume_bit_for_bit():
    """A fused kernel walks over memory: moments must lie as their weights do, also after a checkpoint's round trip."""
    from distill.core.utils.tensor_tree import load_optimizer, optimizer_to_tensors, tensors_to_optimizer

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


def test_a_schedule_free_run_resumes_validates_and_exports_its_average(tmp_path) -> None:
    from safetensors.torch import load_file
    from support.small_run import execute, losses, write_run

    settings = {
        "optimizer": "schedulefree-adamw",
        "max_train_steps": 6,
        "checkpoint_step_interval": 2,
        "report_to": "none",
        "lr_warmup_steps": 2,
        "lr_scheduler": "cosine",
    }
    _, lines = execute(write_run(tmp_path, output="whole", validation_step_interval=2, **settings))
    assert any("lr_scheduler = 'cosine' has no effect" in line for line in lines)
    execute(write_run(tmp_path, output="parts", validation_step_interval=0, **{**settings, "max_train_steps": 4}))
    execute(write_run(tmp_path, output="parts", validation_step_interval=0, **settings))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    exported = load_file(tmp_path / "whole" / "student" / "pytorch_lora_weights.safetensors")
    held = [load_file(file) for file in (tmp_path / "whole" / "checkpoint-6").glob("*.safetensors")]
    trained = {key: value for tensors in held for key, value in tensors.items() if "lora_B" in key}
    pairs = [(value, exported[f"unet.{key.replace('.student.', '.')}"]) for key, value in trained.items()
             if f"unet.{key.replace('.student.', '.')}" in exported]  # fmt: skip
    assert pairs
    assert any(not torch.equal(a, b) for a, b in pairs), "the average, not what the gradients are taken at"


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"optimizer": "adamw"}, 1e-4),
        ({"optimizer": "optimi-lion"}, 2e-5),
        ({"optimizer": "optimi-lion", "learning_rate": 1e-4}, 1e-4),
        ({"optimizer": "prodigy"}, 1.0),
        ({"optimizer": "prodigy", "learning_rate": 0.5}, 0.5),
        ({"optimizer": "bnb-lion8bit", "model_type": "full"}, 2e-7),
    ],
)
def test_learning_rates_where_none_is_given(settings, rate, tmp_path) -> None:
    from distill.core.config.load import load_configuration
    from support.small_run import write_run

    config = write_run(tmp_path, **{"learning_rate": None, **settings})
    found = load_configuration(REGISTRY, config_file=config)
    assert found.run.learning_rate == pytest.approx(rate)
    told = any("wants it" in notice or "for AdamW in the published settings" in notice for notice in found.notices)
    assert told == ("learning_rate" not in settings and settings["optimizer"] != "adamw")


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1e-3), ("lion", 2e-4), ("prodigy", 1.0)])
def test_a_recipe_made_for_adamw_is_fitted(optimizer, rate) -> None:
    from distill.core.config.load import load_configuration

    found = load_configuration(REGISTRY, flags={"optimizer": optimizer})
    assert found.run.learning_rate == pytest.approx(rate)
