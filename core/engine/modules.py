"""Modules that methods bring themselves: made by a role's factory, with seeded weights, trained or frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import PluginError
from ..plugin_api.method import ModuleSetup
from ..utils.seeds import derive_seed

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from ..plugin_api.method import Role


def build_module(role: Role, family: ModelFamily, base: nn.Module, *, seed: int, dtype: torch.dtype) -> nn.Module:
    """Return the module that the factory of `role` makes, on the base's device.

    Its initial weights are a function of `seed` and the role's name, whatever was drawn before. A module that is
    trained gets `dtype`; a frozen one keeps its own types, and is in eval mode.

    Raises:
        PluginError: The factory made something else, or nothing to train.
    """
    assert role.build is not None
    own = derive_seed(seed, "module", role.name)
    device = next(base.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own)
        module: object = role.build(ModuleSetup(family, base, device=device, dtype=dtype, seed=own))
    if not isinstance(module, nn.Module):
        problem = f"the factory of the role {role.name!r} returned {type(module).__name__}, not a torch.nn.Module"
        raise PluginError(f"{problem}. Role(build=...) takes a function of a ModuleSetup that returns the module.")
    weights, trained = list(module.parameters()), role.trains != "none"
    if trained and not weights:
        raise PluginError(f"the module of the role {role.name!r} has no weights to train. Declare it trains='none'.")
    for weight in weights:  # one by one: TorchScript has no requires_grad_()
        weight.requires_grad_(trained)
    return module.to(device, dtype) if trained else module.eval().to(device)


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a trained module that belong to its state, as the vectors of a spectral norm."""
    parameters = {name for name, _ in module.named_parameters()}
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if name not in parameters}
