"""Dropout inside adapters is a named draw: of seed, step, position in the global batch, role and layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill.core.utils.dropout import NamedDropout, NetworkCall, current_call, within
from support.small_run import execute, losses, write_run
from support.tiny_sdxl import write_tiny_sdxl

QUICK = {
    "distillation_method": "guidance",
    "distillation_config": {},
    "lora_dropout": 0.4,
    "max_train_steps": 3,
    "validation_step_interval": 0,
    "checkpoint_step_interval": 0,
    "report_to": "none",
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "evaluation_num_samples": 0,
}


def call(**changes) -> NetworkCall:
    return NetworkCall(**{"seed": 1, "step": 2, "positions": (0, 1, 2), "role": "student", "number": 0, **changes})


def dropped(x: torch.Tensor, *, name: str = "layer", p: float = 0.5, **changes) -> torch.Tensor:
    with within(call(**changes)):
        return NamedDropout(p, name)(x)


def test_each_row_is_a_function_of_its_position():
    x = torch.ones(3, 5, 40)
    whole = dropped(x)
    parts = [dropped(x[i : i + 1], positions=(i,)) for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole[0], whole[1])
    twice = dropped(torch.cat([x, x]))
    assert torch.equal(twice[:3], whole), "of a guided pair, the half with the prompt has the masks of the prompt alone"
    assert not torch.equal(twice[3:], whole)


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}, {"role": "fake_score"}, {"number": 1}, {"name": "other"}])
def test_masks_depend_on_seed_step_role_call_and_layer(change):
    x = torch.ones(3, 200)
    assert not torch.equal(dropped(x), dropped(x, **change))


def test_the_share_is_p_the_mean_is_kept_and_the_gradient_is_the_masks():
    x = torch.ones(3, 100_000, requires_grad=True)
    y = dropped(x, p=0.3)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_the_generator_of_the_process_is_left_alone_and_a_lone_layer_is_pytorchs():
    x, layer = torch.ones(3, 200), NamedDropout(0.5, "layer")
    before = torch.get_rng_state()
    dropped(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert current_call() is None
    torch.manual_seed(0)
    own = layer(x)
    torch.manual_seed(0)
    assert torch.equal(own, torch.nn.functional.dropout(x, 0.5))
    assert torch.equal(layer.eval()(x), x)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs in one folder: the first of them fills the caches, the second has its very settings."""
    root = tmp_path_factory.mktemp("dropout")
    model = write_tiny_sdxl(root / "model")
    several = {
        "cold": {},
        "warm": {},
        "accumulated": {"train_batch_size": 1, "gradient_accumulation_steps": 4},
        "recomputed": {"gradient_checkpointing": True},
        "without": {"lora_dropout": 0.0},
        "begun": {"max_train_steps": 2, "checkpoint_step_interval": 2},
    }
    for output, settings in several.items():
        execute(write_run(root, output=output, model=model, **{**QUICK, **settings}))
    execute(write_run(root, output="begun", model=model, **QUICK))
    return root


def test_a_cold_cache_and_a_warm_one_give_the_same_losses(runs):
    assert losses(runs / "cold") == losses(runs / "warm")
    assert losses(runs / "cold") != losses(runs / "without")


def test_a_resumed_run_gives_the_losses_of_the_whole_one(runs):
    assert losses(runs / "begun") == losses(runs / "cold")


@pytest.mark.parametrize("other", ["accumulated", "recomputed"])
def test_neither_accumulation_nor_recomputation_changes_a_mask(other, runs):
    for (_, a, norm_a), (_, b, norm_b) in zip(losses(runs / "cold"), losses(runs / other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert norm_a == pytest.approx(norm_b, rel=1e-3)
