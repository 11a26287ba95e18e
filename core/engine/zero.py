"""Networks that are trained whole, divided over the processes by DeepSpeed: ZeRO (arXiv 1910.02054), stages 2 and 3.

Each role with a network of its own has a DeepSpeed engine, which averages and divides its gradients and steps this
process's part. Under ``zero3`` the weights are divided too, those of the base and of averages as well. The engines stay
inside: the networks are called as ever, and a backward pass reaches the weights of its own role alone.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from .optimize import RoleOptimizer
from .shards import Twins, parts_of
from .strategy import BuildOptimizer, Strategy
from .zero_state import Fragments, load_state, saved_state

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from ..plugin_api.optimizer import OptimizerPlugin
    from .networks import Networks

SMALL = 2048
"""Weights up to this many elements (norms, most biases) stay whole under zero3: gathering them costs more than they."""


class Zero(Strategy):
    """DeepSpeed's ZeRO: gradients and optimizer states divided (``zero2``), weights as well (``zero3``)."""

    name: ClassVar[str] = "zero"
    lockstep: ClassVar[bool] = True

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        return int(self.settings.name.removeprefix("zero"))

    @property
    def forward_ad(self) -> bool:
        """Return False under zero3: what gathers the weights passes no derivative on."""
        return self.stage == 2

    @property
    def described(self) -> str:
        """The strategy in a few words."""
        what = "gradients and optimizer states" if self.stage == 2 else "weights, gradients and optimizer states"
        over = f"{self.settings.name}, {what} divided over {self.processes.world_size}"
        return over + (", in host memory" if self.settings.offload else "")

    def check(
        self, *, model_type: str, optimizer: type[OptimizerPlugin], quantised: bool, mixed_precision: str
    ) -> None:
        """Refuse what DeepSpeed does not divide."""
        asked = f"parallel = {self.settings.name}"
        for wrong, problem, remedy in self._problems(model_type, optimizer, quantised, mixed_precision):
            if wrong:
                raise UserError(f"{asked} with {problem}", remedy)

    def require_packages(self) -> None:
        """Refuse to begin without DeepSpeed."""
        if find_spec("deepspeed") is None:
            raise UserError(
                f"parallel = {self.settings.name}: DeepSpeed is not installed",
                'pip install "distill-engine[deepspeed]"',
            )

    def _problems(
        self, model_type: str, optimizer: type[OptimizerPlugin], quantised: bool, mixed_precision: str
    ) -> list[tuple[bool, str, str]]:
        chosen = f"optimizer = {optimizer.name}: "
        another = "choose adamw, lion or another one whose step of a weight depends on that weight alone"
        return [
            (
                model_type != "full",
                f"model_type = {model_type}: it divides networks that are trained whole",
                "use replicate or fsdp, or model_type: full",
            ),
            (
                not optimizer.elementwise,
                chosen + "its step looks at whole matrices, and each process has a part of the weights in one row",
                another,
            ),
            (
                optimizer.schedule_free,
                chosen + "it sets its weights aside for evaluation, and DeepSpeed steps a copy of them",
                "choose adamw, or use fsdp",
            ),
            (
                optimizer.parameter_dtype != "float32",
                chosen + "DeepSpeed steps a float32 copy of the weights, which needs no compensation of rounding",
                "choose adamw, or use fsdp",
            ),
            (
                mixed_precision == "fp16",
                "mixed_precision = fp16: DeepSpeed scales and skips by itself, for weights that are half precision, "
                "and these are float32",
                "set mixed_precision: bf16 or no, or use fsdp",
            ),
            (
                quantised and self.stage == 3,
                "a quantised teacher: the packed weights of a layer cannot be cut into equal parts",
                "leave teacher_precision out: divided over N processes, the base takes 1/N of its memory on each",
            ),
        ]

    def place(self, networks: Networks, family: ModelFamily) -> None:
        """Divide, under zero3, what is not trained; trained networks follow with their optimizers."""
        self._start()
        own = {name: networks.module(name) for name in networks.roles if networks.has_own_network(name)}
        self._engines: list[Any] = []
        self._parts: dict[nn.Parameter, nn.Parameter] = {}
        self._twins = Twins(own if self.stage == 3 else {})
        if self.stage == 3:
            trained = set(networks.trained_roles())
            frozen = {id(network): network for name, network in own.items() if name not in trained}
            if any(parameter.requires_grad for parameter in networks.base.parameters()):
                logging.getLogger(__name__).warning("zero3: the base stays whole on each process, with its adapters")
            else:
                frozen[id(networks.base)] = networks.base
            for network in frozen.values():
                self._divide(networks, network)
            networks.on_change(self._release)

    def _start(self) -> None:
        """Let DeepSpeed use the process group that is there."""
        self.processes.require_group()
        if self.processes.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # of DeepSpeed's own calls, in newer versions of torch
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
        with _on_stderr():
            import deepspeed

            # an exchange for inference on CPUs, which would be compiled here and now
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            backend = torch.distributed.get_backend()
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, dist_init_required=False)

    def _divide(
        self, networks: Networks, network: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, clip: float = 0
    ) -> Any:
        """Return DeepSpeed's engine around `network`, whose weights are divided in place."""
        import deepspeed

        for parameter in network.parameters():  # DeepSpeed lays them in one row, and refuses channels-last ones
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        with _on_stderr():
            engine, *_ = deepspeed.initialize(
                model=network, optimizer=optimizer, config=self._config(clip), dist_init_required=False
            )
        found = engine.zero_optimization_stage(), engine.dp_world_size, engine.managed_gradient_accumulation()
        assert found == (self.stage, self.processes.world_size, False), found
        self._engines.append(engine)
        if self.stage == 3:
            self._parts |= parts_of(network.parameters())
            networks.take_parts(self._parts)
        return engine

    def _config(self, clip: float) -> dict[str, Any]:
        on_host = {"device": "cpu", "pin_memory": self.processes.device.type == "cuda"}
        zero: dict[str, Any] = {"stage": self.stage, "contiguous_gradients": True}
        if self.stage == 3:
            # weights are dropped when they were used: several calls before a backward pass, as distillation has
            # them, leave DeepSpeed no order of use by which to keep some. Its own linear layer would take the place of
            # torch's in all of the process
            zero |= {
                "stage3_param_persistence_threshold": SMALL,
                "stage3_max_reuse_distance": 0,
                "memory_efficient_linear": False,
            }
        if self.settings.offload:
            zero |= {"offload_optimizer": on_host} | ({"offload_param": on_host} if self.stage == 3 else {})
        return {
            "train_micro_batch_size_per_gpu": 1,  # only its own figures of speed depend on this
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # the loop says when a step is complete
            "gradient_clipping": clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # which would be compiled at the start
        }

    def _release(self) -> None:
        """Drop gathered weights, which have changed."""
        for engine in self._engines:
            engine.optimizer.empty_partition_cache()  # the engine's own method runs the garbage collector, too

    def optimizer(self, role: str, networks: Networks, build: BuildOptimizer, **settings: Any) -> RoleOptimizer:
        """Return the optimizer of a role: its engine's where it has a network of its own."""
        if not networks.has_own_network(role):
            return super().optimizer(role, networks, build, **settings)
        weights = [p for p in networks.named_parameters(role).values() if p.requires_grad]
        optimizer = build(weights)
        fragments = Fragments(optimizer, weights)
        engine = self._divide(networks, networks.module(role), optimizer, clip=settings["max_grad_norm"])
        return ZeroOptimizer(engine, networks.parameters(role), fragments=fragments, strategy=self, **settings)

    def after_backward(self) -> None:
        """Drop, under zero3, weights that a backward pass has left gathered, also those of other roles."""
        if self.stage == 3:
            self._release()

    @contextmanager
    def exported(self, networks: Networks, role: str) -> Iterator[nn.Module | None]:
        """Give the role's network, whole, in the first process."""
        if role in self._twins:
            with self._twins.filled(role, networks.module(role), keep=self.processes.main) as network:
                yield network
            return
        with networks.use(role) as network:
            yield network if self.processes.main else None


class ZeroOptimizer(RoleOptimizer):
    """The optimizer of a role whose network DeepSpeed has divided.

    Args:
        engine: DeepSpeed's.
        parameters: The weights, or this process's parts of them, as averages see them.
        fragments: Where in DeepSpeed's rows the weights lie.
        strategy: Released after each backward pass.
        settings: Those of :class:`RoleOptimizer`.
    """

    copies_state: ClassVar[bool] = True

    def __init__(
        self, engine: Any, parameters: Sequence[nn.Parameter], *, fragments: Fragments, strategy: Zero, **settings: Any
    ) -> None:
        super().__init__(engine.basic_optimizer, parameters, **settings)
        self._engine, self._fragments, self._strategy = engine, fragments, strategy

    def gradients_to_average(self) -> list[Tensor]:
        """Return nothing: DeepSpeed averages them as it divides them."""
        return []

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of `loss` in this process's part of the role's own weights."""
        divided = self._engine.optimizer
        divided.clear_backward_seen_flag()  # where the engine's own call of the network would
        divided.set_gradient_accumulation_boundary(False)
        # one loss that is not finite makes the averaged gradient so, and DeepSpeed withholds the step everywhere
        good = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)
        with _GradientOf(self._fragments.weights):
            self._engine.backward(loss * good)
        self._strategy.after_backward()

    def step(self, step: int, *, healthy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip and step; withheld where the gradient is not finite, as it is where the loss is not."""
        self._set_learning_rate(step)
        self._engine.optimizer.refresh_fp32_params()  # weights may have been copied, averaged or loaded
        self._engine.step()
        device = self.parameters[0].device
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        return norm, torch.tensor(self._engine.was_step_applied(), device=device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that decides the next steps, whole, in the first process; every process must call it."""
        return saved_state(self._engine, self._fragments)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this process's part of what :meth:`state_dict` returned."""
        self._at_the_start()
        load_state(self._engine, self._fragments, state)


class _GradientOf(TorchFunctionMode):
    """Let backward passes inside the block end in some weights: DeepSpeed's has no argument for them."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._weights = list(weights)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ends = {"inputs": self._weights} if func is Tensor.backward else {}
        return func(*args, **{**(kwargs or {}), **ends})


@contextmanager
def _on_stderr() -> Iterator[None]:
    """Print what DeepSpeed warns of to stderr: stdout is for what programs read."""
    import contextlib
    import sys

    with contextlib.redirect_stdout(sys.stderr):
        yield
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
