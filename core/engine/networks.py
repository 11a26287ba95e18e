"""The networks of a run, by role: one base in memory, with an adapter for each role that trains LoRA.

With LoRA the teacher is the base with adapters off.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..plugin_api.method import is_whole_network
from ..utils.dropout import NamedDropout
from ..utils.seeds import derive_seed
from ..utils.simulated_training import recomputes_blocks
from .adapters import AdapterSwitch, copy_adapter, tuner_layers
from .ema import EMA
from .lora_layers import make_direct, without_weights
from .modules import build_module, changing_buffers
from .shards import part_of, sharded_as

if TYPE_CHECKING:
    from ..plugin_api.family import LoraSettings, ModelFamily
    from ..plugin_api.method import Role

logger = logging.getLogger(__name__)


class Networks:
    """Networks by role, their trainable parameters and their averages.

    Args:
        family: Loads the base and makes copies for full training.
        roles: The roles that the method declared.
        lora: Shape of adapters.
        seed: Seed of the adapters' initial weights.
        gradient_checkpointing: Recompute activations in the backward pass.
        parameter_dtype: Type of trained LoRA weights (bfloat16 only for optimizers that compensate the rounding).
        ema_decay: Decay of another average of the student, for ``use_ema``; None without.
        merging: Whether passes of adapters run on merged weights, where they may and memory has room.
    """

    def __init__(
        self,
        family: ModelFamily,
        roles: Sequence[Role],
        *,
        lora: LoraSettings | None,
        seed: int,
        gradient_checkpointing: bool = False,
        parameter_dtype: torch.dtype = torch.float32,
        ema_decay: float | None = None,
        merging: bool = False,
    ) -> None:
        self.roles = {role.name: role for role in roles}
        self._family, self._lora, self._seed, self._dtype = family, lora, seed, parameter_dtype
        self.base = family.load_network().requires_grad_(False)
        self._modules: dict[str, nn.Module] = {}
        self._parts: dict[nn.Parameter, nn.Parameter] = {}
        self._listeners: list[Callable[[], None]] = []
        self._switch: AdapterSwitch | None = None
        for role in sorted(roles, key=lambda role: role.trains != "full"):
            # copies of the base first, while no adapter is inside it: then any order of the roles will do
            self._modules[role.name] = self._build(role)
        adapters = [role.name for role in roles if self._is_adapter(role)]
        self._switch = AdapterSwitch(self.base, merging=merging) if adapters else None
        for role in roles:
            self._set_trainable(role)
            if role.source is not None:
                self.copy(role.name, role.source)
        self._make_averages(ema_decay)
        if gradient_checkpointing:
            self._enable_checkpointing()

    def _make_averages(self, ema_decay: float | None) -> None:
        self._averages = {
            role.name: EMA(self._all_parameters(role.name), decay=role.ema_decay)
            for role in self.roles.values()
            if role.ema_of is not None
        }
        self.average = None if ema_decay is None else EMA.copy_of(self.parameters("student"), decay=ema_decay)

    def restart_averages(self) -> None:
        """Begin every average at the present weights, which were changed by something else than training."""
        self._make_averages(None if self.average is None else self.average.decay)

    def take_parts(self, parts: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Step, average and copy these parts of weights in the place of the weights, which are sharded by now.

        Args:
            parts: Sharded weight -> this process's part of it, on the same storage.
        """
        self._parts = dict(parts)
        self.restart_averages()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` from now on whenever weights were changed by something else than an optimizer's step."""
        self._listeners.append(listener)

    def changed(self) -> None:
        """Tell that weights were changed."""
        if self._switch is not None:
            self._switch.changed()
        for listener in self._listeners:
            listener()

    def _is_adapter(self, role: Role) -> bool:
        """Return True if the role's weights are an adapter on the shared base."""
        return role.trains == "lora" or (role.source is not None and self._is_adapter(self.roles[role.source]))

    def _has_second_time(self, role: Role) -> bool:
        return role.second_time or (role.source is not None and self._has_second_time(self.roles[role.source]))

    def _build(self, role: Role) -> nn.Module:
        if self._is_adapter(role):
            return self._add_adapter(role)
        if role.source is not None:
            return nn.Module.to(copy.deepcopy(self._modules[role.source]), self._width_of(role))
        if role.trains == "full":
            shape = {"guidance_embedding": role.guidance_embedding, "second_time": role.second_time}
            if role.name == "student" and self._family.smaller_keys(self._family.config):
                shape["smaller"] = True
            student = self._family.student_network(self.base, **shape)
            # fp32 masters under autocast, unless the optimizer compensates bf16 rounding itself
            return nn.Module.to(student, self._dtype)  # that of diffusers' models warns of every cast
        if role.trains == "head":
            return self._heads(role)
        if role.build is not None:
            return build_module(role, self._family, self.base, seed=self._seed, dtype=self._dtype)
        return self.base

    def _width_of(self, role: Role) -> torch.dtype:
        """Return the role's type; an average in half precision would lose its small steps to rounding."""
        return torch.promote_types(self._dtype, torch.float32) if role.ema_of is not None else self._dtype

    def _heads(self, role: Role) -> nn.Module:
        from ..diffusion.adversarial import Heads

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._seed, "heads", role.name))
            channels = [role.head_inputs * width for width in self._family.feature_channels(self.base)]
            heads = Heads(channels, kind=role.heads, levels=role.head_levels)
        return heads.to(next(self.base.parameters()).device, self._dtype)

    def _add_adapter(self, role: Role) -> nn.Module:
        from peft import LoraConfig

        assert self._lora is not None
        targets = list(self._lora.target_modules or self._family.lora_targets)
        config = LoraConfig(
            r=self._lora.rank,
            lora_alpha=self._lora.alpha,  # type: ignore[arg-type]  # peft takes floats
            lora_dropout=self._lora.dropout if role.trains == "lora" else 0.0,
            target_modules=targets,
            exclude_modules=without_weights(self.base, targets) or None,
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            torch.manual_seed(derive_seed(self._seed, "lora", role.name))
            try:
                self.base.add_adapter(config, adapter_name=role.name)  # type: ignore[operator]
            except ValueError as error:
                raise UserError(
                    f"lora_target_modules = {targets}: none of these is a module of this network",
                    f"leave the key out for the family's own list: {' '.join(self._family.lora_targets)}",
                ) from error
            self._name_dropout(role)
            make_direct(layer for _, layer in tuner_layers(self.base))
            if self._has_second_time(role):
                self._family.add_second_time(self.base, name=role.name)
        for parameter in self._own(self.base, role.name).values():
            parameter.data = parameter.data.to(self._width_of(role))
        return self.base

    def _name_dropout(self, role: Role) -> None:
        """Make the masks of an adapter's dropout named draws."""
        for name, layer in tuner_layers(self.base):
            for adapter, dropout in layer.lora_dropout.items():
                if adapter == role.name and isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[adapter] = NamedDropout(dropout.p, name)

    @staticmethod
    def _own(base: nn.Module, role: str) -> dict[str, nn.Parameter]:
        """Return the parameters of the base that belong to an adapter's role: its LoRA and its second time."""
        marker = f".{role}."
        return {
            name: parameter
            for name, parameter in base.named_parameters()
            if marker in name and ("lora_" in name or name.startswith("second_time."))
        }

    def _set_trainable(self, role: Role) -> None:
        # after all adapters are there: adding one freezes the others
        for parameter in self._all_parameters(role.name):
            parameter.requires_grad_(role.trains != "none")

    @torch.no_grad()
    def copy(self, target: str, source: str) -> None:
        """Give role `target` the weights of role `source`."""
        pairs = zip(self._all_parameters(target), self._all_parameters(source), strict=True)
        for to, of in pairs:
            to.copy_(of)
        self._copy_buffers(target, source)
        self.changed()

    def _copy_buffers(self, target: str, source: str) -> None:
        for to, of in zip(self._buffers(target).values(), self._buffers(source).values(), strict=True):
            to.copy_(of)

    @torch.no_grad()
    def start_from(self, role: str, path: str) -> None:
        """Give the role's adapter the weights of the LoRA at `path`, its scale folded in, and its second time.

        Raises UserError when that LoRA has another rank, other modules, or a second time that the role lacks.
        """
        assert self._switch is not None
        assert self._lora is not None
        try:
            self._family.attach_adapter(self.base, path, "init")
            for name, layer in tuner_layers(self.base):
                copy_adapter(layer, "init", role, name=name, path=path, rank=self._lora.rank)
            self._move_second_time("init", role, path=path)
            self.base.delete_adapters("init")  # type: ignore[operator]
        finally:
            # attaching makes the new adapter active and freezes the others
            for each in self.roles.values():
                self._set_trainable(each)
            self._switch.reset()
        for each in self.roles.values():
            if each.source == role:
                self.copy(each.name, role)
        self.restart_averages()

    def _move_second_time(self, source: str, target: str, *, path: str) -> None:
        """Give `target` the second time of `source`, which loses it; without one, `target` keeps its start at zero."""
        times: Any = getattr(self.base, "second_time", {})
        if source not in times:
            return
        if target not in times:
            raise UserError(
                f"init_lora = {path}: a second time lies beside it, which the {target} of this run does not take",
                "start from a student of a method without a second time, or copy the LoRA's file into a folder of its "
                "own to start from that alone",
            )
        times[target].load_state_dict(times.pop(source).state_dict())

    def _enable_checkpointing(self) -> None:
        for name, role in self.roles.items():
            if role.trains not in ("lora", "full"):
                continue
            module: Any = self._modules[name]
            if not recomputes_blocks(module):
                logger.warning(
                    "gradient_checkpointing: a %s recomputes nothing, so all its activations are kept",
                    type(module).__name__,
                )
                continue
            switch = self._switch if module is self.base else None
            module.enable_gradient_checkpointing(switch.checkpoint if switch else None)

    # -- access -----------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """Switch on the role's adapters, and no others, inside the block; yield its network."""
        module = self._modules[role]
        adapter = role if self._is_adapter(self.roles[role]) else None
        with self._switch.use(adapter) if self._switch and module is self.base else nullcontext():
            yield module

    def module(self, role: str) -> nn.Module:
        """Return the module that the role runs on, whatever adapters are on."""
        return self._modules[role]

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the role's own weights by name: its adapter, or the whole network when it is a copy of its own."""
        self.changed()  # sharded weights are named while they are not gathered
        module = self._modules[role]
        if self._is_adapter(self.roles[role]):
            return self._own(module, role)
        shared = module is self.base or self.roles[role].auxiliary
        return {} if shared else dict(module.named_parameters())

    def _buffers(self, role: str) -> dict[str, Tensor]:
        """Return the buffers that a module of a method's own changes as it runs; a denoiser has none."""
        declared = self.roles[role]
        while declared.source is not None:
            declared = self.roles[declared.source]
        return changing_buffers(self._modules[role]) if declared.trains == "module" else {}

    def _all_parameters(self, role: str) -> list[nn.Parameter]:
        return [self._parts.get(p, p) for p in self.named_parameters(role).values()]

    def parameters(self, role: str) -> list[nn.Parameter]:
        """Return the role's trainable parameters, in a fixed order; of sharded ones this process's parts."""
        return [p for p in self._all_parameters(role) if p.requires_grad]

    def denoisers(self) -> list[nn.Module]:
        """Return the base and every network of its own, each once."""
        found = [self.base, *(self._modules[name] for name in self.roles if self.has_own_network(name))]
        return list(dict.fromkeys(found))

    def has_own_network(self, role: str) -> bool:
        """Return True if the role's weights are a whole denoiser of its own."""
        return is_whole_network(self.roles, role)

    def trained_roles(self) -> list[str]:
        """Return the roles that an optimizer steps, in the method's order."""
        return [name for name, role in self.roles.items() if role.trains != "none"]

    # -- averages ---------------------------------------------------------------------------------------------------

    def update_averages(self, stepped: str) -> None:
        """Update every average of the role that was just stepped; once per optimizer step."""
        if self._switch is not None:
            self._switch.changed(stepped)
        for name, average in self._averages.items():
            if self.roles[name].ema_of == stepped:
                average.update(self._all_parameters(stepped))
                with torch.no_grad():
                    self._copy_buffers(name, stepped)
                self.changed()
        if self.average is not None and stepped == "student":
            self.average.update(self.parameters("student"))

    @torch.no_grad()
    def apply_ema(self, role: str) -> None:
        """Make the ``use_ema`` average the student's weights, from which the next stage starts."""
        if self.average is not None and role == "student":
            self.average.copy_to(self.parameters("student"))
            self.changed()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the ``use_ema`` average in the student's place inside the block; do nothing without one."""
        with self.average.applied_to(self.parameters("student")) if self.average else nullcontext():
            self.changed()
            yield
        self.changed()

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the groups of tensors that decide the future, for a checkpoint."""
        groups = {f"network-{name}": {**self.named_parameters(name), **self._buffers(name)} for name in self.roles}
        return {name: {n: self._stored(t) for n, t in group.items()} for name, group in groups.items() if group} | (
            {"average": self._average_state(self.average)} if self.average else {}
        )

    def _stored(self, tensor: Tensor) -> Tensor:
        """Return a weight for a checkpoint; one whose own memory comes and goes as the parts that are there."""
        part = self._parts.get(tensor)  # type: ignore[call-overload]
        return tensor.detach() if part is None else sharded_as(part.detach(), tensor)

    def _average_state(self, average: EMA) -> dict[str, Tensor]:
        wholes = {part: weight for weight, part in self._parts.items()}
        likes = [wholes.get(part) for part in self.parameters("student")]
        tensors = average.state_dict()
        sharded = {
            name: sharded_as(tensors[name], like)
            for name, like in zip(tensors, likes, strict=False)
            if like is not None
        }
        return tensors | sharded

    @torch.no_grad()
    def load_state(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Restore what :meth:`state` returned, bit for bit."""
        own = self.state()
        for name, group in own.items():
            if name not in groups or set(groups[name]) != set(group):
                raise UserError(f"the checkpoint has no matching weights for {name!r}", "start a new output_dir")
            if name == "average" and self.average:
                self.average.load_state_dict({key: part_of(tensor) for key, tensor in groups[name].items()})
                continue
            for key, tensor in group.items():
                saved = groups[name][key]
                if saved.shape != tensor.shape:
                    shapes = f"{tuple(saved.shape)} in the checkpoint and {tuple(tensor.shape)} now"
                    raise UserError(f"{name}: {key} has shape {shapes}", "resume with the lora_rank of that run")
                part_of(tensor).copy_(part_of(saved))
        self.changed()
