"""Products of networks that are trained whole, rounded to fp8 by torchao: here with emulated rounding on the CPU."""

import pytest
import torch
from distill.core.engine import fp8_training
from distill.core.engine.fp8_training import check_fp8, exact_products, train_in_fp8
from distill.core.errors import UserError
from support.sdxl_setup import make_batch, make_setup
from support.tiny_sdxl import write_tiny_sdxl

CUDA, GOOD = torch.device("cuda"), {"model_type": "full", "mixed_precision": "bf16", "lockstep": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


def gradients(model, *, fp8):
    """(loss, gradient, layers that were converted) of one lcm step of a full student."""
    family, method, networks, context = make_setup(model, model_type="full", dtype=torch.float32)
    before = {name: value.clone() for name, value in networks.module("student").state_dict().items()}
    count = train_in_fp8(networks, family, emulate=True) if fp8 else 0
    after = networks.module("student").state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before), "weights and their names stay"
    batch = make_batch(family, dtype=torch.float32)
    (update,) = method.updates(context.at(0, batch.positions), batch, 0)
    update.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in networks.parameters("student")])
    return update.loss.item(), gradient, networks, count


def test_losses_and_gradients_are_those_of_exact_products_but_for_rounding(model):
    loss, gradient, _, none = gradients(model, fp8=False)
    rounded_loss, rounded, networks, count = gradients(model, fp8=True)
    assert (none, count > 20) == (0, True)
    assert rounded_loss == pytest.approx(loss, rel=0.2)
    assert rounded_loss != loss
    assert torch.cosine_similarity(gradient, rounded, dim=0) > 0.9
    kinds = {type(layer).__name__ for layer in networks.base.modules()}
    assert "Fp8Linear" not in kinds, "the teacher's products stay"


def test_sampling_computes_products_as_users_will(model):
    family, _, networks, _ = make_setup(model, model_type="full", dtype=torch.float32)
    batch = make_batch(family, dtype=torch.float32)
    inputs = (batch.latents, torch.full((len(batch),), 500.0), batch.cond)
    student, guidance = networks.module("student"), torch.full((len(batch),), 3.0)
    with torch.no_grad():
        exact = family.predict(student, *inputs, guidance=guidance)
        train_in_fp8(networks, family, emulate=True)
        assert not torch.equal(family.predict(student, *inputs, guidance=guidance), exact)
        with exact_products():
            assert torch.equal(family.predict(student, *inputs, guidance=guidance), exact)


@pytest.mark.parametrize(
    ("change", "card", "words"),
    [
        ({"model_type": "lora"}, (9, 0), "base_model_precision to fp8-torchao"),
        ({"mixed_precision": "no"}, (9, 0), "set mixed_precision to bf16"),
        ({"lockstep": True}, (9, 0), "set parallel to replicate"),
        ({}, (8, 6), "choose such a card"),
        ({}, (8, 9), None),
    ],
)
def test_what_cannot_be_computed_in_fp8_is_refused(monkeypatch, change, card, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    if words is None:
        check_fp8(CUDA, **{**GOOD, **change})
        return
    with pytest.raises(UserError, match="fp8_training: ") as error:
        check_fp8(CUDA, **{**GOOD, **change})
    assert words in error.value.remedy


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(fp8_training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torchao is not installed"):
        check_fp8(CUDA, **GOOD)
