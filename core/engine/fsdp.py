"""Weights sharded over the processes, block by block, by torch's ``fully_shard``.

The frozen base is sharded in its own types; networks of their own (full students, full fake scores, their averages) are
sharded each on the same mesh. Adapters, second times, heads and what methods bring themselves stay whole on every
process. Optimizers and averages see this process's parts, plain tensors, so that any optimizer whose step of a weight
depends on that weight alone is the one of an unsharded run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from .optimize import RoleOptimizer, total_norm
from .sharded_checkpoint import empty_part
from .shards import Twins, part_of, parts_of, sharded_as
from .strategy import BuildOptimizer, Strategy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..plugin_api.family import ModelFamily
    from ..plugin_api.optimizer import OptimizerPlugin
    from .networks import Networks


_OF_WEIGHT = re.compile(r"state\.(\d+)\.")


class FullyShard(Strategy):
    """Fully sharded data parallel training (FSDP2), on a mesh of replicas x shards."""

    name: ClassVar[str] = "fsdp"
    lockstep: ClassVar[bool] = True
    writes_parts: ClassVar[bool] = True

    @property
    def described(self) -> str:
        """The strategy in a few words."""
        shards = self.settings.shard_size or self.processes.world_size
        copies = self.processes.world_size // shards
        over = f"over {shards}" + (f", in {copies} copies" if copies > 1 else "")
        return f"fsdp, weights sharded {over}" + (", in host memory" if self.settings.offload else "")

    def check(
        self, *, model_type: str, optimizer: type[OptimizerPlugin], quantised: bool, mixed_precision: str
    ) -> None:
        """Refuse what cannot be sharded, and a mesh that the processes do not fill."""
        world, shards = self.processes.world_size, self.settings.shard_size
        if shards and world % shards:
            raise UserError(
                f"parallel_shard_size = {shards}: {world} processes are no multiple of it",
                "set a divisor of the number of processes, or 0 for all",
            )
        if quantised:
            key = "teacher_precision" if model_type == "full" else "base_model_precision"
            raise UserError(
                "parallel = fsdp with a quantised base: the packed weights of a layer cannot be cut into equal parts",
                f"leave {key} out: sharded over N processes, the base takes 1/N of its memory on each",
            )
        if model_type == "full" and not optimizer.elementwise:
            raise UserError(
                f"optimizer = {optimizer.name} with parallel = fsdp and model_type = full: its step looks at whole "
                "matrices, and each process holds a part of them",
                "choose adamw, lion or another one whose step of a weight depends on that weight alone",
            )

    def place(self, networks: Networks, family: ModelFamily) -> None:
        """Shard the base and every network of its own."""
        mesh = self._mesh()
        own = {name: networks.module(name) for name in networks.roles if networks.has_own_network(name)}
        self._twins = Twins(own)
        replicated = {p for name in networks.roles if name not in own for p in networks.named_parameters(name).values()}
        self._networks = list({id(network): network for network in (networks.base, *own.values())}.values())
        for network in self._networks:
            _shard(network, family.shard_units(network), mesh, replicated=replicated, offload=self.settings.offload)
        self._blocks = {id(network): _blocks_of(network, family.shard_units(network)) for network in self._networks}
        for network in self._networks:
            _prefetch(self._blocks[id(network)], True)
        networks.take_parts(parts_of(p for network in self._networks for p in network.parameters()))
        networks.on_change(self._gather_anew)

    def _mesh(self) -> DeviceMesh:
        from torch.distributed import init_device_mesh

        self.processes.require_group()
        world, device = self.processes.world_size, self.processes.device.type
        shards = self.settings.shard_size or world
        if shards == world:
            return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        return init_device_mesh(device, (world // shards, shards), mesh_dim_names=("replicate", "shard"))

    @contextmanager
    def partial_pass(self, network: nn.Module) -> Iterator[None]:
        """Let no block of `network` gather the next one, which may never be computed.

        What is gathered and not used would stay, and be used at a later step although the weights have changed.
        """
        blocks = self._blocks.get(id(network), [])
        _prefetch(blocks, False)
        try:
            yield
        finally:
            _prefetch(blocks, True)

    def _gather_anew(self) -> None:
        """Drop gathered weights: those outside of the blocks stay gathered between passes, and have changed."""
        for network in self._networks:
            _drop_gathered(network)

    def optimizer(self, role: str, networks: Networks, build: BuildOptimizer, **settings: Any) -> RoleOptimizer:
        """Return the optimizer of a role, over this process's parts where its network is sharded."""
        if not networks.has_own_network(role):
            return super().optimizer(role, networks, build, **settings)
        parameters = networks.parameters(role)
        return ShardedOptimizer(build(parameters), parameters, network=networks.module(role), **settings)

    def scaler(self, role: str, networks: Networks) -> torch.amp.GradScaler:
        """Return a scaler that all processes lower together."""
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        if not networks.has_own_network(role):
            return super().scaler(role, networks)
        return ShardedGradScaler(self.processes.device.type)

    @contextmanager
    def exported(self, networks: Networks, role: str) -> Iterator[nn.Module | None]:
        """Give the role's network, gathered in the first process's host memory."""
        if role not in self._twins:
            with networks.use(role) as network:
                yield network if self.processes.main else None
            return
        with self._twins.filled(role, networks.module(role), keep=self.processes.main) as network:
            yield network


class ShardedOptimizer(RoleOptimizer):
    """The optimizer of a role whose network is sharded, over this process's parts.

    Args:
        optimizer: A torch optimizer over `parameters`.
        parameters: This process's parts of the weights.
        network: The role's network.
        settings: Those of :class:`RoleOptimizer`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        network: nn.Module,
        **settings: Any,
    ) -> None:
        super().__init__(optimizer, parameters, **settings)
        self._network = network
        self._wholes = [p for p in network.parameters() if p.requires_grad]
        assert len(self._wholes) == len(self.parameters)

    def state_tensors(self) -> tuple[dict[str, Tensor], Any]:
        """Return the state, its moments as the sharded tensors that they are parts of."""
        tensors, meta = super().state_tensors()
        found = {}
        for name, tensor in tensors.items():
            number = _number(name)
            of_weight = number is not None and tensor.ndim and tensor.shape == self.parameters[number].shape
            found[name] = sharded_as(tensor, self._wholes[number]) if of_weight else tensor  # type: ignore[index]
        return found, meta

    def load_tensors(self, tensors: Mapping[str, Tensor], meta: Any) -> None:
        """Restore the state from sharded moments."""
        super().load_tensors({name: part_of(tensor) for name, tensor in tensors.items()}, meta)

    def empty_parts(self, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Return an empty sharded tensor for each moment of a saved state."""
        found = {}
        for name, (shape, dtype) in shapes.items():
            number = _number(name)
            if number is not None and len(shape) and shape == self._wholes[number].shape:
                found[name] = empty_part(self._wholes[number], dtype)
        return found

    def gradients_to_average(self) -> list[Tensor]:
        """Return nothing: gradients were averaged as they were sharded."""
        return []

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of `loss` in this process's parts of the role's own weights."""
        scaled = self.scaler.scale(loss) if self.scaler else loss
        torch.autograd.backward(scaled, inputs=_gathered(self._network))
        for whole, part in zip(self._wholes, self.parameters, strict=True):
            part.grad = None if whole.grad is None else whole.grad.to_local()  # type: ignore[attr-defined]

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        mesh = self._wholes[0].device_mesh  # type: ignore[attr-defined]
        square = total_norm(gradients).square().to(mesh.device_type)  # offloaded parts lie on the host
        torch.distributed.all_reduce(square, group=mesh.get_group("shard"))
        return square.sqrt().to(self.parameters[0].device)

    def _end(self) -> None:
        super()._end()
        for whole in self._wholes:
            whole.grad = None
        _drop_gathered(self._network)  # what lies outside of the blocks was gathered before the step


def _number(name: str) -> int | None:
    """Return the number of the weight that a tensor of an optimizer's state belongs to."""
    match = _OF_WEIGHT.match(name)
    return None if match is None else int(match[1])


def _shard(
    network: nn.Module, units: Sequence[str], mesh: DeviceMesh, *, replicated: set[nn.Parameter], offload: bool
) -> None:
    """Shard the blocks of `network`, each gathered when it is computed, and then what lies outside of them."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    for parameter in network.parameters():  # channels-last weights are refused
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    shared: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": replicated,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    for block in _blocks_of(network, units):
        fully_shard(block, reshard_after_forward=True, **shared)
    # features stop a pass inside the network, whose backward then finds what lies outside of the blocks still there
    fully_shard(network, reshard_after_forward=False, **shared)


def _blocks_of(network: nn.Module, units: Sequence[str]) -> list[Any]:
    """Return the sharded blocks of `network` in the order in which a pass computes them."""
    return [network.get_submodule(name) for name in units]


def _prefetch(blocks: Sequence[Any], wanted: bool) -> None:
    """Let each block gather the next one before it is computed, or not; a backward pass always does."""
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following] if wanted else [])


def _drop_gathered(network: Any) -> None:
    """Drop the gathered weights outside of the blocks, also where features have stopped the last pass halfway."""
    network.set_reshard_after_forward(True, recurse=False)  # else those of a pass that has not ended are kept
    network.reshard()
    network.set_reshard_after_forward(False, recurse=False)


def _gathered(network: nn.Module) -> list[Tensor]:
    """Return the weights that the backward pass of `network` ends in: whole ones, there while they are gathered."""
    from torch.distributed.fsdp import FSDPModule

    found: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, FSDPModule):
            for group in _groups(module):
                found += [w for p in group.fsdp_params if (w := getattr(p, "_unsharded_param", None)) is not None]
    return [weight for weight in found if weight.requires_grad]


def _groups(module: Any) -> list[Any]:
    # there is no public way from a sharded parameter to the leaf of the graph
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
