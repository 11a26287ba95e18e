"""How several processes share the networks of a run: the contract of a strategy, and the one that replicates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..errors import UserError
from .buckets import AveragingOptimizer
from .optimize import RoleOptimizer

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from ..plugin_api.method import Requirements
    from ..plugin_api.optimizer import OptimizerPlugin
    from ..utils.strategies import ParallelSettings
    from .networks import Networks
    from .processes import Processes

BuildOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Strategy:
    """The base of every network on each process; gradients are averaged after the backward pass.

    Args:
        processes: Those of the run.
        settings: What was asked for.
    """

    name: ClassVar[str] = "replicate"
    lockstep: ClassVar[bool] = False
    """Whether a forward pass needs all processes, so that validation, scores and export run on each of them."""
    writes_parts: ClassVar[bool] = False
    """Whether each process writes its parts of a checkpoint; else the first one writes it whole."""

    def __init__(self, processes: Processes, settings: ParallelSettings) -> None:
        self.processes, self.settings = processes, settings

    @property
    def forward_ad(self) -> bool:
        """Return True if the networks can be differentiated in forward mode."""
        return True

    @property
    def described(self) -> str:
        """The strategy in a few words, for logs."""
        return "the base on each, gradients averaged"

    def check(
        self, *, model_type: str, optimizer: type[OptimizerPlugin], quantised: bool, mixed_precision: str
    ) -> None:
        """Raise UserError where the strategy cannot be that of such a run, before weights load."""

    def check_method(self, name: str, needs: Requirements) -> None:
        """Raise UserError where the method `name` needs of its networks what the strategy does not let pass."""
        if needs.forward_ad and not self.forward_ad:
            raise UserError(
                f"parallel = {self.settings.name}: {name} differentiates its networks in forward mode, which does not "
                "pass what gathers their weights",
                "use zero2, fsdp or replicate, or a derivative by differences where the method has one",
            )

    def require_packages(self) -> None:
        """Raise UserError where a package is missing that the strategy needs."""

    def place(self, networks: Networks, family: ModelFamily) -> None:
        """Bring the networks, which are complete by now, into the form in which they are trained."""

    def optimizer(self, role: str, networks: Networks, build: BuildOptimizer, **settings: Any) -> RoleOptimizer:
        """Return the optimizer of a role.

        Args:
            role: A trained role.
            networks: Placed.
            build: Makes a torch optimizer over parameters.
            settings: Further arguments of :class:`RoleOptimizer`.
        """
        parameters = networks.parameters(role)
        if self.processes.world_size == 1:
            return RoleOptimizer(build(parameters), parameters, **settings)
        return AveragingOptimizer(build(parameters), parameters, **settings)

    def scaler(self, role: str, networks: Networks) -> torch.amp.GradScaler:
        """Return the scaler of a role's loss in a run of fp16."""
        return torch.amp.GradScaler(self.processes.device.type)

    def partial_pass(self, network: nn.Module) -> AbstractContextManager[None]:
        """Return the block around a pass that may stop inside of `network`, whose last blocks are then not computed."""
        return nullcontext()

    @contextmanager
    def exported(self, networks: Networks, role: str) -> Iterator[nn.Module | None]:
        """Give the role's network with whole weights, for export; None on processes that do not write.

        Every process that enters must do so together where the strategy is in :attr:`lockstep`.
        """
        with networks.use(role) as network:
            yield network
