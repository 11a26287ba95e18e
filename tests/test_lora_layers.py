"""Layers with LoRA give what peft's give, and passes without a gradient may run on merged weights."""

import copy
import logging

import pytest
import torch
from distill.core.engine import adapters, lora_layers, merged_products
from distill.core.engine.adapters import AdapterSwitch, tuner_layers
from distill.core.engine.lora_layers import DirectConv2d, DirectLinear, make_direct
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 1, bias=False)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 5, bias=False)

    def forward(self, x):
        hidden = self.point(self.wide(x).tanh())
        return self.last(self.first(hidden.flatten(2).transpose(1, 2)).tanh())


def make(*, dtype=torch.float64, layout=torch.contiguous_format, names=("student",), dropout=0.0, targets=None):
    """A network with adapters whose second factors are not zero."""
    torch.manual_seed(0)
    network = Small().requires_grad_(False)
    targets = targets or ["wide", "point", "first", "last"]
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, target_modules=targets)
    for name in names:
        network = inject_adapter_in_model(config, network, adapter_name=name)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
        parameter.requires_grad_("lora_" in name)
    return network.to(dtype).to(memory_format=layout)


def direct(network):
    copied = copy.deepcopy(network)
    make_direct(layer for _, layer in tuner_layers(copied))
    return copied


def gradients(network, x):
    network.zero_grad()
    output = network(x)
    output.square().sum().backward()
    return output.detach(), [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradients_are_those_of_peft(layout):
    network = make(layout=layout)
    ours = direct(network)
    assert {type(layer) for _, layer in tuner_layers(ours)} == {DirectLinear, DirectConv2d}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    (expected, wanted), (output, found) = gradients(network, x), gradients(ours, x)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_under_autocast_the_input_is_not_cast_to_and_fro_and_the_values_are_those_of_half_precision():
    network = make(dtype=torch.float32)
    ours, x = direct(network), torch.randn(2, 3, 8, 8)
    exact = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected, output = network(x), ours(x)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert (output - exact).norm() < 1.1 * (expected - exact).norm() < 0.02 * exact.norm()


def test_an_adapter_that_is_off_and_one_of_two_and_one_with_dropout_run_as_in_peft():
    network = make(names=("student", "fake"), dropout=0.5)
    ours, x = direct(network), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for each in (network, ours):
        each.train()
        with AdapterSwitch(each).use("fake"):
            torch.manual_seed(1)
            each.found = each(x)
        each.off = each(x)
    torch.testing.assert_close(ours.found, network.found, rtol=1e-13, atol=1e-13)
    assert torch.equal(ours.off, network.off)
    assert not torch.equal(ours.off, ours.found)


# -- merged weights ---------------------------------------------------------------------------------------------------


def merging(**changes):
    network = direct(make(**changes))
    return network, AdapterSwitch(network, merging=True), torch.randn(2, 3, 8, 8, dtype=torch.float64)


def values(network, switch, x, role="student"):
    """Without a gradient (merged), and with one."""
    with torch.no_grad(), switch.use(role):
        merged = network(x)
    with switch.use(role):
        return merged, network(x).detach()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_pass_without_a_gradient_runs_on_merged_weights_and_the_base_stays_as_it_is(layout):
    network, switch, x = merging(layout=layout, names=("student", "fake"))
    before = copy.deepcopy(network.state_dict())
    for role in ("student", "fake", "student"):
        merged, expected = values(network, switch, x, role)
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), switch.use("student"):
        assert all(layer.merged_weight is not None for _, layer in tuner_layers(network))
        with switch.use(None):
            assert all(layer.merged_weight is None for _, layer in tuner_layers(network))
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_pass_with_a_gradient_runs_on_merged_weights_and_its_gradients_are_those_of_peft(monkeypatch, layout, whole):
    """By either way, also towards the input, and where the gradient is itself differentiated."""
    asked = []
    monkeypatch.setattr(merged_products, "_by_whole_weight", lambda *sizes: asked.append(sizes) or whole)
    network, switch, x = merging(layout=layout)
    as_peft = make(layout=layout)
    x = x.to(memory_format=layout).requires_grad_()

    def found(each):
        output = each(x)
        parameters = [p for p in each.parameters() if p.requires_grad]
        first = torch.autograd.grad(output.square().sum(), [x, *parameters], create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), [x, *parameters])
        each.zero_grad()
        each(x).square().sum().backward()
        return [output, *first, *second, *(p.grad for p in parameters)]

    with switch.use("student"):
        ours = found(network)
    assert len(asked) == 3 * 4, "each of four layers, in two backward passes and in the one through the first"
    torch.testing.assert_close(ours, found(as_peft), rtol=1e-10, atol=1e-9)


def test_recomputed_passes_run_on_the_merged_weights_of_their_forward_pass():
    network, switch, x = merging(names=("student", "fake"))
    found = []
    for run in (network, lambda x: switch.checkpoint(network, x)):
        with switch.use("student"):
            first = run(x)
        with switch.use("fake"):
            second = run(first.mean(dim=(1, 2))[:, None, None, None].expand_as(x) + x)
        network.zero_grad()
        (first.square().sum() + second.square().sum()).backward()  # no adapter is on by now
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        assert all(layer.merged_weight is None for _, layer in tuner_layers(network))
    assert len(found[0]) == 2 * 2 * 4, "two factors of four layers of both"
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_a_pass_saves_no_weights_and_an_adapter_may_not_change_before_its_backward_pass():
    """Saved tensors may be sent to the host's memory, where weights are not to go; frozen factors get no gradient."""
    network, switch, x = merging()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), switch.use("student"):
        output = network(x.requires_grad_())
        layers = [layer for _, layer in tuner_layers(network)]
        weights = {each.data_ptr() for layer in layers for each in (layer.base_layer.weight, layer.merged_weight)}
    assert saved
    assert len(weights) == 2 * 4, "of four layers"
    assert weights.isdisjoint(each.data_ptr() for each in saved)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("first" in name and "lora_" in name)
    with switch.use("student"):
        network(x).sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        f"first.lora_{factor}.student.weight" for factor in "AB"
    }
    switch.changed("student")
    with switch.use("student"), torch.no_grad():
        network(x)
    with pytest.raises(RuntimeError, match="changed between"):
        output.sum().backward()


def test_the_way_to_the_gradients_of_the_factors_is_that_of_fewer_multiplications():
    """Rank 64: through the whole weight in layers of 128, through the rank in SDXL's of 1280; a 3x3 kernel reads 9x."""
    assert merged_products._by_whole_weight(4096, 128, 128, 64)
    assert not merged_products._by_whole_weight(4096, 1280, 1280, 64)
    assert merged_products._by_whole_weight(4096, 9 * 64, 64, 64)
    assert not merged_products._by_whole_weight(16, 128, 128, 64), "few rows"


def test_under_autocast_nothing_is_merged():
    """It would round the merged weight, and the adapter would be lost."""
    network, switch, _ = merging(dtype=torch.float32)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = direct(make(dtype=torch.float32))(x)
        for without in (torch.no_grad(), torch.enable_grad()):
            with without, switch.use("student"):
                assert torch.equal(network(x), expected)


def test_merged_weights_are_made_once_for_an_update_and_again_after_it(monkeypatch):
    network, switch, x = merging()
    calls = []
    merge = lora_layers._merge
    monkeypatch.setattr(lora_layers, "_merge", lambda *given: calls.append(merge(*given)))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 0.1, fused=True)
    for count in (4, 4, 8):
        if count == 8:
            with switch.use("student"):
                gradients(network, x)
            optimizer.step()  # a fused one, which the counters of tensors do not tell of
            switch.changed("student")
        merged, expected = values(network, switch, x)
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
        assert len(calls) == count


@pytest.mark.parametrize(("changes", "count"), [({"dtype": torch.bfloat16}, 0), ({"dropout": 0.5}, 0), ({}, 4)])
def test_half_precision_and_dropout_are_not_merged(changes, count):
    network, switch, x = merging(**changes)
    with torch.no_grad(), switch.use("student"):
        assert sum(layer.merged_weight is not None for _, layer in tuner_layers(network)) == count
        assert torch.isfinite(network(x.to(next(network.parameters()).dtype))).all()


def test_without_room_the_adapters_run_as_they_are_and_the_log_says_so(monkeypatch, caplog):
    network, switch, x = merging()
    needed = sum(layer.base_layer.weight.nbytes for _, layer in tuner_layers(network))
    monkeypatch.setattr(adapters, "free_memory_bytes", lambda device: 2 * needed - 1)
    with caplog.at_level(logging.INFO):
        merged, expected = values(network, switch, x)
    assert torch.equal(merged, expected)
    with torch.no_grad(), switch.use("student"), switch.use(None), switch.use("student"):
        assert torch.equal(network(x), expected)  # nested, and asked once
    assert caplog.text.count("copies of the weights") == 1
    assert f"copies of the weights take {needed / 1e6:.0f} MB" in caplog.text


def test_half_precision_would_lose_the_adapter():
    """Why it is not merged: of a change by a thousandth, four fifths are lost in a bf16 weight."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(512, 512).bfloat16()
    change = 1e-3 * 0.02 * torch.randn(512, 512)
    kept = (weight.float() + change).bfloat16().float() - weight.float()
    assert 0.7 < (kept - change).norm() / change.norm() < 0.9


def test_an_adapter_without_room_inside_a_merged_pass_leaves_that_pass_merged(monkeypatch):
    network, switch, x = merging(names=("student", "fake"))
    with torch.no_grad(), switch.use("student"):
        monkeypatch.setattr(adapters, "free_memory_bytes", lambda device: 0)
        with switch.use("fake"):
            assert all(layer.merged_weight is None for _, layer in tuner_layers(network))
        assert all(layer.merged_weight is not None for _, layer in tuner_layers(network))
