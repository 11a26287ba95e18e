"""The engine's services to a method for one micro-batch: predictions, guidance and named random draws."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..diffusion.prediction import Prediction
from ..utils.dropout import NetworkCall, within
from ..utils.eagerly import eagerly
from ..utils.full_precision import full_precision
from ..utils.seeds import RngStreams
from ..utils.spans import FEATURES, FORWARD, span
from .family_parts import FIRST_HALF
from .stage import StageProgress, stage_of

if TYPE_CHECKING:
    from ..diffusion.schedule import Schedule, SolverGrid
    from .batch import Conditioning
    from .family import ModelFamily
    from .family_parts import Blocks
    from .stage import Stage


@dataclass(frozen=True)
class Runtime:
    """The parts of a context that stay the same over a run."""

    family: ModelFamily
    networks: NetworksByRole
    seed: int
    device: torch.device
    autocast_dtype: torch.dtype | None = None
    grids: dict[int, SolverGrid] = field(default_factory=dict)
    """Grids on the device by number of steps; kept, since a new grid would be copied to the device at every step."""
    stages: Sequence[Stage] = ()
    """The method's stages, in order."""
    activation_offload: bool = False
    """Whether what the backward pass needs waits for it in memory of the host."""
    average: Callable[[Sequence[Tensor]], None] | None = None
    """A function that averages tensors over processes, in place; None where there is one process."""
    partial_pass: Callable[[nn.Module], AbstractContextManager[None]] = lambda network: nullcontext()
    """The block around a pass that may stop inside of a network (:meth:`.strategy.Strategy.partial_pass`)."""


class Context:
    """One micro-batch's view of the run.

    Args:
        runtime: Family, networks, seed and device.
        step: The optimizer step that the random draws belong to.
        positions: Position of each sample in the global batch.
    """

    def __init__(self, runtime: Runtime, *, step: int = 0, positions: Sequence[int] = ()) -> None:
        self._runtime = runtime
        self.step = step
        self.rng = RngStreams(runtime.seed, step, positions, runtime.device)
        self._calls: Counter[str] = Counter()
        self._in_full_precision = False
        self.schedule: Schedule = runtime.family.schedule
        self.prediction_type = runtime.family.prediction_type

    @property
    def device(self) -> torch.device:
        """The device of the batch."""
        return self._runtime.device

    def at(self, step: int, positions: Sequence[int]) -> Context:
        """Return the same run as another micro-batch sees it."""
        return Context(self._runtime, step=step, positions=positions)

    def grid(self, num_steps: int) -> SolverGrid:
        """Return the schedule's grid with `num_steps` steps, on the device."""
        grids = self._runtime.grids
        if num_steps not in grids:
            grids[num_steps] = self.schedule.grid(num_steps).to(self.device)
        return grids[num_steps]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average statistics over the processes, in place; every process must call it equally often."""
        if self._runtime.average is not None:
            self._runtime.average(tensors)

    @property
    def stage(self) -> StageProgress:
        """The stage of the method that this step belongs to."""
        return stage_of(self._runtime.stages, self.step)

    def predict(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        *,
        guidance: Tensor | None = None,
        r: Tensor | None = None,
    ) -> Prediction:
        """Return the role's prediction at `x_t` (B, ...) and time `t` (B,).

        Args:
            role: A role that the method declared.
            x_t: Noised latents, shape (B, ...), in the schedule's scaling.
            t: Times in the schedule's units, shape (B,).
            cond: Conditioning, each tensor of shape (B, ...).
            guidance: The paper's w (guidance scale minus one), shape (B,), for networks with a guidance embedding.
            r: Second times in the schedule's units, shape (B,), for roles with a second time.
        """
        runtime = self._runtime
        time = self.schedule.network_time(t)
        second = None if r is None else self.schedule.network_time(r)
        with span(FORWARD, role), self._call(role) as network, self._arithmetic(network), self._saving():
            output = runtime.family.predict(network, x_t, time, cond, guidance=guidance, second_time=second)
        return Prediction(output, x_t, t, self.schedule, self.prediction_type)

    @contextmanager
    def _call(self, role: str) -> Iterator[nn.Module]:
        """Give the role's network for one call, whose dropout is a function of the step, the positions and the role."""
        number = self._calls[role]
        self._calls[role] += 1
        call = NetworkCall(self.rng.seed, self.step, self.rng.positions, role, number)
        with self._runtime.networks.use(role) as network, within(call):
            yield network

    def _arithmetic(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Return the context of a call of `network`: the run's autocast, or fp32 throughout."""
        if self._in_full_precision and self._runtime.autocast_dtype is not None:
            return full_precision(network, self.device)
        return self._autocast()

    def _saving(self) -> AbstractContextManager[Any]:
        """Return the context of a call whose activations are kept for the backward pass."""
        if not self._runtime.activation_offload or not torch.is_grad_enabled():
            return nullcontext()
        return save_on_cpu(pin_memory=self.device.type == "cuda")

    def _autocast(self) -> torch.autocast:
        dtype = self._runtime.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def uncond(self, cond: Conditioning) -> Conditioning:
        """Return the unconditional counterpart of `cond`, shapes as in `cond`; the family decides what that is."""
        return self._runtime.family.uncond(cond)

    def predict_guided(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        scale: Tensor,
        *,
        role: str = "teacher",
        guided: bool = True,
    ) -> Prediction:
        """Return the guided teacher's prediction.

        Guidance is classifier-free, both halves in one batched call, or uses the network's own guidance input if it has
        one.

        Args:
            x_t: Noised latents, shape (B, ...).
            t: Times in the schedule's units, shape (B,).
            cond: Conditioning, each tensor of shape (B, ...).
            scale: Guidance scale g of uncond + g (cond - uncond), shape (B,).
            role: The role whose network is guided.
            guided: False where every scale is 1, which one call with the prompt alone gives.
        """
        if self._runtime.family.guided_by_input:
            return self.predict(role, x_t, t, cond, guidance=scale - 1)
        if not guided:
            return self.predict(role, x_t, t, cond)
        return self.with_guidance(*self.predict_cond_uncond(role, x_t, t, cond), scale)

    def with_guidance(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """Return the guided prediction from those with and without the prompt: uncond + g (cond - uncond), or what the
        family's pipeline makes of them; `scale` g has shape (B,).
        """
        return self._runtime.family.with_guidance(cond, uncond, scale)

    def predict_cond_uncond(
        self, role: str, x_t: Tensor, t: Tensor, cond: Conditioning
    ) -> tuple[Prediction, Prediction]:
        """Return the role's predictions with and without the prompt, from one batched call.

        Args:
            role: A role that the method declared.
            x_t: Noised latents, shape (B, ...).
            t: Times in the schedule's units, shape (B,).
            cond: Conditioning, each tensor of shape (B, ...).
        """
        uncond = self.uncond(cond)
        both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
        joint = self.predict(role, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        halves = [Prediction(half, x_t, t, self.schedule, joint.prediction_type) for half in joint.output.chunk(2)]
        return halves[0], halves[1]

    # -- longer than one call of a network ---------------------------------------------------------------------------

    def rollout(
        self,
        role: str,
        times: Sequence[Tensor],
        x: Tensor,
        cond: Conditioning,
        *,
        name: str,
        gradient_calls: int = 1,
    ) -> Prediction:
        """Sample in several steps as consistency models do (arXiv 2303.01469): denoise, renoise to the next time,
        denoise.

        Args:
            role: The role whose network is called.
            times: Falling times, each of shape (B,) in the schedule's units; the network is called once for each.
            x: Input of the first call, at times[0]; shape (B, ...).
            cond: Conditioning, each tensor of shape (B, ...).
            name: Name of the noise draws.
            gradient_calls: Number of calls, the last ones, that the gradient runs through; the activations of all of
                them are in memory at once.

        Returns:
            The prediction of the last call.
        """
        if gradient_calls < 1:
            raise ValueError(f"gradient_calls = {gradient_calls}: at least the last call carries a gradient")
        first = len(times) - gradient_calls
        for i, (t, following) in enumerate(itertools.pairwise(times)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
                x_0 = self.predict(role, x, t, cond).x0
                eps = self.rng.randn(f"{name}/{i}", x.shape[1:]).to(x_0.dtype)
                x = self.schedule.add_noise(x_0, eps, following)
        return self.predict(role, x, times[-1], cond)

    def jvp(
        self,
        function: Callable[..., Tensor],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        *,
        step: float | None = None,
        precision: Literal["float32", "mixed"] = "float32",
    ) -> Tensor:
        """Return the derivative of `function` at `primals` along `tangents`, without a graph for the backward pass.

        Args:
            function: Takes as many tensors as there are primals.
            primals: The point at which to differentiate.
            tangents: The direction, shapes as the primals.
            step: None for the exact derivative, by forward-mode differentiation. Otherwise h of the central difference
                (f(p + h v) - f(p - h v)) / 2h, for networks whose kernels have no forward mode.
            precision: Arithmetic of the networks that `function` calls: fp32 whatever the run's, with weights of half
                precision cast layer by layer; or ``mixed``, the run's own, whose rounding a difference divides by 2h.
        """
        with torch.no_grad(), self._full_precision(precision == "float32"), eagerly():
            if step is not None:
                ahead = function(*(p + step * v for p, v in zip(primals, tangents, strict=True)))
                behind = function(*(p - step * v for p, v in zip(primals, tangents, strict=True)))
                return (ahead - behind) / (2 * step)
            with self._runtime.family.forward_ad(), forward_ad.dual_level():
                duals = [forward_ad.make_dual(p, v) for p, v in zip(primals, tangents, strict=True)]
                tangent = forward_ad.unpack_dual(function(*duals)).tangent
        assert tangent is not None, "the function does not depend on what is varied"
        return tangent

    # -- in pixels ---------------------------------------------------------------------------------------------------

    def decode(self, x: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of scaled latents `x` (B, C, h, w), with the gradient to `x`.

        0 is black and 1 white; values beyond are not clamped. One sample is decoded at a time, and again in the
        backward pass. Methods that call it require ``pixels``.
        """
        return self.by_sample(self._runtime.family.decode_pixels, x)

    @staticmethod
    def by_sample(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return what `function` gives for the samples, computed for one after the other, and once more in the backward
        pass: no more than one sample's activations are in memory.

        Args:
            function: Takes tensors of one sample (1, ...) each, and returns one (1, ...). It must not draw, nor change
                anything.
            tensors: Its arguments for all samples, each (B, ...).
        """
        samples = [tensor.split(1) for tensor in tensors]
        if len(samples[0]) == 1 or not torch.is_grad_enabled():
            return torch.cat([function(*sample) for sample in zip(*samples, strict=True)])
        once_more = functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        with set_checkpoint_early_stop(False):  # it stops by an exception, which TorchScript turns into a failure
            return torch.cat([once_more(*sample) for sample in zip(*samples, strict=True)])

    @contextmanager
    def _full_precision(self, wanted: bool) -> Iterator[None]:
        before, self._in_full_precision = self._in_full_precision, wanted
        try:
            yield
        finally:
            self._in_full_precision = before

    # -- inside the networks -----------------------------------------------------------------------------------------

    def features(
        self, role: str, x_t: Tensor, t: Tensor, cond: Conditioning, *, blocks: Blocks = FIRST_HALF
    ) -> list[Tensor]:
        """Return activations inside the role's network, each (B, C_k, h_k, w_k), in the order of its blocks.

        The gradient reaches `x_t` and, for a trained role, its weights. What comes after the last block is not
        computed.

        Args:
            role: A role that the method declared.
            x_t: Noised latents, shape (B, ...).
            t: Times in the schedule's units, shape (B,).
            cond: Conditioning, each tensor of shape (B, ...).
            blocks: The blocks whose outputs they are (:meth:`.family.ModelFamily.features`).
        """
        runtime = self._runtime
        inside = runtime.partial_pass
        with (
            span(FEATURES, role),
            self._call(role) as network,
            inside(network),
            self._autocast(),
            eagerly(if_whole=True),
        ):
            return runtime.family.features(network, x_t, self.schedule.network_time(t), cond, blocks=blocks)

    def logits(self, role: str, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits of the heads of `role`, (B, P_k) of each level that they read; above 0 means real.

        They are computed in at least fp32, outside of mixed precision.

        Args:
            role: A role with heads (``trains="head"``).
            features: What :meth:`features` returned, each (B, C_k, h_k, w_k).
        """
        with span(FORWARD, role), self._runtime.networks.use(role) as heads:
            return heads(features)

    def call(self, role: str, *args: Any, **settings: Any) -> Any:
        """Return what the module of `role`, which its factory made (``Role(build=...)``), gives for these arguments.

        The gradient reaches the arguments and, for a trained module, its weights. A trained one runs as the networks
        do, under mixed precision; a frozen one in its own types.
        """
        with span(FORWARD, role), self._runtime.networks.use(role) as module:
            trained = any(weight.requires_grad for weight in module.parameters())
            with self._autocast() if trained else nullcontext():
                return module(*args, **settings)


class NetworksByRole(Protocol):
    """Maps roles to networks: :class:`.networks.Networks` in a run, :class:`ExportedNetworks` after it."""

    def use(self, role: str) -> AbstractContextManager[nn.Module]:
        """Return a context manager that gives the role's network with its adapters switched on."""
        ...
