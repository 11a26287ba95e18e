"""Checks of an optimizer: it steps, it descends, it continues after a checkpoint as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..plugin_api.optimizer import OptimizerSettings
from ..utils.tensor_tree import load_optimizer, optimizer_to_tensors, tensors_to_optimizer
from .checks import Subject, expect, failing
from .suite import Named

STEPS = 100
ENOUGH = 0.8
"""Share of the loss that may be left."""
RATE = 1e-2
SETTINGS = OptimizerSettings(RATE, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)


def checks(subject: Subject) -> list[Named]:
    """Return checks on a noisy quadratic of two weights, (8, 4) and (4,)."""
    return [
        ("build() gives a torch optimizer", partial(_builds, subject)),
        ("a step moves the weights", partial(_steps, subject)),
        (f"the loss of a quadratic falls by a fifth in {STEPS} steps", partial(_descends, subject)),
        ("it follows the learning rate that the engine sets", partial(_rate, subject)),
        ("a resumed run is the same run", partial(_resumes, subject)),
    ]


def _weights(subject: Subject) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    dtype = getattr(torch, subject.cls.parameter_dtype)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in ((8, 4), (4,))]


def _rate_of(subject: Subject) -> float:
    """Return the learning rate, which is a factor for an optimizer that finds its step size itself."""
    return 1.0 if subject.cls.estimates_learning_rate else RATE


def _make(subject: Subject, weights: list[nn.Parameter]) -> Any:
    subject.need_packages()
    plugin = subject.cls(subject.config())
    with failing("build()", "it is given parameters and OptimizerSettings"):
        return plugin.build(weights, replace(SETTINGS, learning_rate=_rate_of(subject)))


def _step(weights: list[nn.Parameter], optimizer: Any, seed: int) -> float:
    noise = torch.Generator().manual_seed(seed)
    parts = [(w.float() + 0.1 * torch.randn(w.shape, generator=noise)).square().sum() for w in weights]
    loss = torch.stack(parts).sum()
    optimizer.zero_grad()
    loss.backward()
    with failing("step()", "the engine calls it without a closure"):
        optimizer.step()
    return float(loss.detach())


def _copies(weights: list[nn.Parameter]) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in weights]


def _builds(subject: Subject) -> None:
    weights = _weights(subject)
    optimizer = _make(subject, weights)
    kind = type(optimizer).__name__
    expect(isinstance(optimizer, torch.optim.Optimizer), f"build() returned a {kind}", "return a torch.optim.Optimizer")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expect(held == {id(p) for p in weights}, "it does not hold the parameters that it was given", "pass on all of them")


def _steps(subject: Subject) -> None:
    weights = _weights(subject)
    optimizer, before = _make(subject, weights), _copies(weights)
    for seed in range(3):
        _step(weights, optimizer, seed)
    moved = [not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)]
    finite = all(bool(weight.isfinite().all()) for weight in weights)
    expect(all(moved), "step() left the weights as they were", "step() must change them by their gradients")
    expect(finite, "step() made the weights infinite or nan", "look at epsilon and at the type of the moments")


def _descends(subject: Subject) -> None:
    weights = _weights(subject)
    optimizer = _make(subject, weights)
    losses = [_step(weights, optimizer, seed) for seed in range(STEPS)]
    expect(
        losses[-1] < ENOUGH * losses[0],
        f"the loss of a quadratic went from {losses[0]:.3g} to {losses[-1]:.3g} in {STEPS} steps at a learning rate of "
        f"{_rate_of(subject)}",
        f"it must fall to {ENOUGH:.0%}: does it step against the gradient?",
    )


def _rate(subject: Subject) -> None:
    weights = _weights(subject)
    optimizer = _make(subject, weights)
    _step(weights, optimizer, 0)
    for group in optimizer.param_groups:
        expect("lr" in group, "its param_groups have no 'lr'", "the engine's schedule is written there")
        if isinstance(group["lr"], torch.Tensor):  # as the engine does it
            group["lr"].zero_()
        else:
            group["lr"] = 0.0
    before = _copies(weights)
    _step(weights, optimizer, 1)
    still = all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    expect(still, "with a learning rate of 0 in its param_groups it still moves", "read group['lr'] at each step")


def _resumes(subject: Subject) -> None:
    weights = _weights(subject)
    optimizer = _make(subject, weights)
    for seed in range(7):
        _step(weights, optimizer, seed)
    copies = [nn.Parameter(weight) for weight in _copies(weights)]
    with failing("a round trip of state_dict()", "it must hold tensors, numbers, texts, lists and dicts alone"):
        tensors, meta = optimizer_to_tensors(optimizer.state_dict())
        saved = {name: tensor.clone() for name, tensor in tensors.items()}
        resumed = _make(subject, copies)
        load_optimizer(resumed, tensors_to_optimizer(saved, json.loads(json.dumps(meta, allow_nan=False))))
    for seed in range(7, 20):
        ours, theirs = _step(copies, resumed, seed), _step(weights, optimizer, seed)
        expect(
            ours == theirs,
            f"{seed - 6} steps after loading its state the loss is {ours:.8g}, without a stop {theirs:.8g}",
            "keep whatever decides the next step in state_dict(), and restore it bit for bit",
        )
