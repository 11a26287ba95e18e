"""Checks of a quantizer: less memory, nearly the same output, and a LoRA on top that trains."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checks import NotApplicable, Subject, expect, failing
from .suite import Named

WIDTH, DEVICE = 256, "cpu"
CLOSE = 0.25
"""Largest error of the output, as a share of its root mean square."""


class Block(nn.Module):
    """Two linear layers with a norm between them, (B, 256) -> (B, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.LayerNorm(2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, 256) for x (B, 256)."""
        return self.last(nn.functional.silu(self.norm(self.first(x))))


def checks(subject: Subject) -> list[Named]:
    """Return checks on two linear layers of 256 and 512 features."""
    return [
        ("it says whether it is usable", partial(_usable, subject)),
        ("memory falls", partial(_memory, subject)),
        ("the output stays close", partial(_output, subject)),
        ("modules keep their names and are linear layers", partial(_names, subject)),
        ("what is kept stays as it is", partial(_keeps, subject)),
        ("a LoRA on top trains", partial(_lora, subject)),
    ]


def _usable(subject: Subject) -> None:
    subject.need_packages()
    with failing("usable()", "it answers with None or a reason"):
        said = subject.cls.usable(DEVICE)
    expect(said is None or (isinstance(said, str) and said), f"usable() returned {said!r}", "return None or a reason")


def _made(subject: Subject, *, keep: tuple[str, ...] = ()) -> tuple[Any, nn.Module, nn.Module]:
    """Return (quantizer, network, quantised network)."""
    subject.need_packages()
    reason = subject.cls.usable(DEVICE)
    if reason:
        raise NotApplicable(f"it is not usable on {DEVICE}: {reason}")
    quantizer = subject.cls(subject.config())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Block().requires_grad_(False).eval()
    with failing("quantize()", "it is given a frozen network on the host, and returns the quantised one on the device"):
        return quantizer, network, quantizer.quantize(copy.deepcopy(network), device=DEVICE, keep=keep)


def _input() -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


def _memory(subject: Subject) -> None:
    quantizer, network, quantised = _made(subject)
    before, after = quantizer.stored_bytes(network), quantizer.stored_bytes(quantised)
    expect(after < before, f"the network took {before} bytes and takes {after}", "hold its weights in fewer bits")


@torch.no_grad()
def _output(subject: Subject) -> None:
    _, network, quantised = _made(subject)
    expected, x = network(_input()), _input()
    with failing("a forward", "the quantised network takes what the network took"):
        found, again = quantised(x), quantised(x)
    expect(found.dtype == expected.dtype and found.shape == expected.shape, f"the output is {found.dtype} "
           f"{tuple(found.shape)}, it was {expected.dtype} {tuple(expected.shape)}", "keep the types")  # fmt: skip
    expect(torch.equal(found, again), "two calls on one input differ", "no draws, and no state between calls")
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    expect(error <= CLOSE, f"the output is {error:.0%} of its size away", f"at most {CLOSE:.0%}: look at the scales")


def _names(subject: Subject) -> None:
    _, network, quantised = _made(subject)
    names = {name for name, _ in network.named_modules()} - {name for name, _ in quantised.named_modules()}
    expect(not names, f"the modules {sorted(names)} are gone", "replace a module by one of the same name")
    layers = {name: quantised.get_submodule(name) for name in ("first", "last")}
    strange = {name: type(layer).__name__ for name, layer in layers.items() if not isinstance(layer, nn.Linear)}
    expect(not strange, f"quantised layers are {strange}", "derive them from nn.Linear, for peft to adapt")


def _keeps(subject: Subject) -> None:
    quantizer, network, quantised = _made(subject, keep=("last",))
    kept, whole = quantised.get_submodule("last"), network.get_submodule("last")
    same = type(kept) is nn.Linear and torch.equal(kept.weight, whole.weight)  # type: ignore[arg-type]
    expect(same, "keep=('last',) did not keep the layer as it is", "leave those layers alone")
    less = quantizer.stored_bytes(quantised) < quantizer.stored_bytes(network)
    expect(less, "with keep=('last',) nothing is quantised", "quantise the others")


def _lora(subject: Subject) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    _, _, quantised = _made(subject)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["first", "last"], init_lora_weights=False)
    with failing("adding a LoRA", "the layers must be ones that peft adapts"):
        inject_adapter_in_model(config, quantised, "student")
        adapter = {name: p for name, p in quantised.named_parameters() if "lora_" in name}
        optimizer = torch.optim.Adam(adapter.values(), lr=1e-2)
        target, losses = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2)), []
        for _ in range(40):
            x = _input().requires_grad_()
            loss = (quantised(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    expect(
        x.grad is not None and bool(x.grad.abs().sum() > 0),
        "no gradient reaches the input",
        "a forward that autograd knows",
    )
    expect(losses[-1] < 0.8 * losses[0], f"in 40 steps the loss of a LoRA on top went from {losses[0]:.3g} to "
           f"{losses[-1]:.3g}", "it must fall by a fifth: do gradients pass through the quantised layers?")  # fmt: skip
