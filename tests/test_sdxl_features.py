"""Activations inside SDXL's UNet, for discriminators: the first half only, with gradients."""

from __future__ import annotations

import pytest
import torch
from support.second_time import add_lora, inputs, make
from support.tiny_sdxl import write_tiny_sdxl


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make(write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model"))


def test_features_are_the_outputs_of_the_down_blocks_and_the_middle_block(family):
    network = add_lora(family.load_network(), "student")
    x_t, t, _, cond = inputs(family)
    expected = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: expected.append(out[0] if isinstance(out, tuple) else out))
        for block in [*network.down_blocks, network.mid_block]
    ]
    with torch.no_grad():
        family.predict(network, x_t, t, cond)
        for hook in hooks:
            hook.remove()
        found = family.features(network, x_t, t, cond)
    assert [feature.shape[1] for feature in found] == family.feature_channels(network)
    assert [tuple(feature.shape[2:]) for feature in found] == [(4, 4), (4, 4), (4, 4)]
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_second_half_is_not_computed_and_nothing_stays_behind(family):
    network = family.load_network()
    x_t, t, _, cond = inputs(family)
    before = family.predict(network, x_t, t, cond)
    calls = []
    hooks = [block.register_forward_hook(lambda m, a, out: calls.append(m)) for block in network.up_blocks]
    family.features(network, x_t, t, cond)
    assert not calls
    family.predict(network, x_t, t, cond)
    assert len(calls) == 2
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(RuntimeError):
        family.features(network, x_t[:, :3], t, cond)  # a mistake on the way leaves no hook either
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.equal(family.predict(network, x_t, t, cond), before)


def test_gradients_of_the_image_and_the_adapter_equal_finite_differences(family):
    network = add_lora(family.load_network(), "student").double()
    x_t, t, _, cond = inputs(family, dtype=torch.float64)
    weights = [torch.randn(f.shape[1:], dtype=torch.float64) for f in family.features(network, x_t, t, cond)]

    def loss(x):
        return sum((w * f).sum() for w, f in zip(weights, family.features(network, x, t, cond), strict=True))

    x = x_t.clone().requires_grad_()
    loss(x).backward()
    direction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        difference = (loss(x_t + 1e-6 * direction) - loss(x_t - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((x.grad * direction).sum(), difference, rtol=1e-6, atol=1e-8)
    reached = {
        name.split(".")[0]
        for name, p in network.named_parameters()
        if "lora_B" in name and p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == {"down_blocks", "mid_block"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_no_feature(family, checkpointing):
    network = add_lora(family.load_network(), "student").train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    x_t, t, _, cond = inputs(family)
    x = x_t.clone().requires_grad_()
    sum(feature.square().sum() for feature in family.features(network, x, t, cond)).backward()
    plain = x_t.clone().requires_grad_()
    other = add_lora(family.load_network(), "student").train()
    sum(feature.square().sum() for feature in family.features(other, plain, t, cond)).backward()
    assert torch.equal(x.grad, plain.grad)


def test_features_of_the_second_half_and_of_one_block(family):
    network = family.load_network()
    x_t, t, _, cond = inputs(family)
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert family.block_names(network) == names
    assert family.feature_channels(network, blocks="all") == [16, 32, 32, 32, 16]
    with torch.no_grad():
        every = family.features(network, x_t, t, cond, blocks="all")
        half = family.features(network, x_t, t, cond)
        (middle,) = family.features(network, x_t, t, cond, blocks=["mid_block"])
    assert [tuple(level.shape[1:]) for level in every] == [(16, 4, 4), (32, 4, 4), (32, 4, 4), (32, 8, 8), (16, 8, 8)]
    assert all(torch.equal(one, other) for one, other in zip(every, half, strict=False))
    assert torch.equal(middle, half[-1])
    assert family.prompt_dimensions(network) == {"prompt_embeds": 80, "pooled_prompt_embeds": 48}


def test_families_without_features_say_so(family):
    from distill.core.plugin_api.family import ModelFamily

    with pytest.raises(NotImplementedError, match="no features"):
        ModelFamily.features(family, torch.nn.Identity(), torch.zeros(1), torch.zeros(1), {})
    with pytest.raises(NotImplementedError, match="no second time"):
        ModelFamily.add_second_time(family, torch.nn.Identity())
