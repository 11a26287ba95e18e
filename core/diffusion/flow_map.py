r"""A second time for a network, and the sampler that supplies it. A copy lies beside every student that needs it.

A flow map takes x_t to x_r for any t > r, so its network takes both times as input (arXiv 2406.07507, 2505.13447).
No pipeline knows r: here :class:`SecondTime` adds an embedding of t - r to the output of the network's own time
embedding, and :class:`FlowMapScheduler` knows which r comes next.

This file imports torch, diffusers and safetensors only, so that it works without the package it comes from::

    from runpy import run_path
    run_path("student/flow_map.py")["attach"](pipe, "student")  # after pipe.load_lora_weights("student")
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from safetensors import safe_open
from torch import Tensor, nn

WEIGHTS = "second_time.safetensors"
"""File with the embedding's weights; its header says where they belong."""
PLACE = "place"
"""Key of the header: JSON with the pipeline's component and the name of the time embedding inside it."""
NUM_FREQUENCIES = 128
"""Number of frequencies of the sinusoid of t - r: 10000^(-k/128), as for the time itself."""


class SecondTime(nn.Module):
    """An embedding of t - r, both in the network's time units: sinusoid, Linear, SiLU, Linear that starts at zero.

    Args:
        width: Output width, that of the network's time embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * NUM_FREQUENCIES, width)
        self.output = nn.Linear(width, width)
        # a generator of its own: the same start wherever and whenever it is made
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            spread = torch.randn(self.hidden.weight.shape, generator=generator) / math.sqrt(2 * NUM_FREQUENCIES)
            self.hidden.weight.copy_(spread)
        for zero in (self.hidden.bias, self.output.weight, self.output.bias):
            nn.init.zeros_(zero)

    def forward(self, t: Tensor, r: Tensor) -> Tensor:
        """Return the embedding (B, width) of times (B,); sinusoid and weights in at least fp32, also under autocast."""
        dtype = torch.promote_types(torch.promote_types(t.dtype, r.dtype), torch.float32)
        steps = torch.arange(NUM_FREQUENCIES, dtype=dtype, device=t.device)
        angle = (t.to(dtype) - r.to(dtype))[:, None] * torch.exp(steps * (-math.log(10000.0) / NUM_FREQUENCIES))
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)
        with torch.autocast(t.device.type, enabled=False):
            return self.output(nn.functional.silu(self.hidden(waves.to(self.hidden.weight.dtype))))


class SecondTimes(nn.ModuleDict):
    """The second times of one network by name (of a role), hooked to its time embedding; none is on by default.

    Args:
        path: Name of the time embedding inside the network.
        untimed: Number of its last rows that are of no sample, as of text at a time that is always 0.
    """

    def __init__(self, path: str, untimed: int = 0) -> None:
        super().__init__()
        self.path, self.untimed = path, untimed
        self._given: tuple[str, Callable[[], Sequence[Any]]] | None = None

    def follow(self, name: str, times: Callable[[], Sequence[Any]]) -> None:
        """Apply the embedding `name` from now on.

        Args:
            name: Name of the embedding.
            times: Called for each forward pass; returns (t, r) as tensors (B,) or numbers, in the network's time units.
        """
        self._given = (name, times)

    @contextlib.contextmanager
    def given(self, name: str, times: Callable[[], Sequence[Any]]) -> Iterator[None]:
        """Apply the embedding `name` inside the block, as :meth:`follow` does; restore what was applied before."""
        before = self._given
        self.follow(name, times)
        try:
            yield
        finally:
            self._given = before

    def add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Add the embedding to the output (B, ..., width) of the time embedding, as its forward hook."""
        if self._given is None:
            return None
        name, times = self._given
        t, r = (_one_axis(time, output.device) for time in times())
        timed, rest = output.tensor_split([len(output) - self.untimed])
        added = self[name](t, r).to(output.dtype)
        timed = timed + added.unflatten(0, (-1, *[1] * (output.ndim - 2)))
        return torch.cat([timed, rest]) if self.untimed else timed


def _one_axis(time: Any, device: torch.device) -> Tensor:
    return time if isinstance(time, Tensor) else torch.full((1,), time, dtype=torch.float32, device=device)


def install(network: nn.Module, *, name: str, path: str, width: int, untimed: int = 0) -> SecondTime:
    """Give `network` the second time `name` in place, at ``network.second_time.<name>``, in fp32.

    Args:
        network: Keeps its own weights as they are.
        name: Name of the role that it belongs to; made once, and returned by later calls.
        path: The module to whose output (B, ..., width) it is added. It must not be recomputed in a backward pass
            (gradient checkpointing of later blocks is fine).
        width: Output width of the module at `path`.
        untimed: Number of the last rows of its output that keep what they are.
    """
    times: Any = getattr(network, "second_time", None)
    if times is None:
        times = SecondTimes(path, untimed)
        network.add_module("second_time", times)
        network.get_submodule(path).register_forward_hook(times.add)
    if name not in times:
        device = next(network.parameters()).device
        times[name] = SecondTime(width).to(device)
    return times[name]


def load_second_time(network: nn.Module, folder: str | Path, *, name: str) -> bool:
    """Load the second time stored in `folder` onto `network`; return False where there is none."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        place = json.loads(file.metadata()[PLACE])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    width = len(weights["output.bias"])
    module = install(network, name=name, path=place["module"], width=width, untimed=place.get("untimed", 0))
    module.load_state_dict(weights)
    module.requires_grad_(False)
    return True


def attach(pipe: Any, folder: str | Path) -> Any:
    """Give a diffusers pipeline the scheduler and the second time stored in a student's folder."""
    pipe.scheduler = FlowMapScheduler.from_pretrained(folder, subfolder="scheduler")
    path = Path(folder) / WEIGHTS
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            place = json.loads(file.metadata()[PLACE])
        network = getattr(pipe, place["component"])
        load_second_time(network, folder, name="student")
        network.second_time.follow("student", lambda: pipe.scheduler.pair)
        if getattr(network.config, "time_cond_proj_dim", None) is not None:
            network.get_submodule(place["module"]).register_forward_hook(_check_told)
    return pipe


def _check_told(module: nn.Module, args: Any, output: Tensor) -> None:
    """Raise ValueError in a call of the time embedding without the guidance scale, which pipelines leave out unsaid."""
    if len(args) < 2 or args[1] is None:
        raise ValueError(
            "this student takes its guidance scale as an input, and this pipeline does not tell it (those of a "
            "ControlNet with an image to begin from do not): tell it by hand, as distill's docs/beside.md shows, or "
            "use a LoRA"
        )


class FlowMapScheduler(SchedulerMixin, ConfigMixin):
    r"""Any number of steps along a flow map, without noise between them: x_r = alpha_r x_0 + sigma_r eps.

    x_0 and eps are the network's output at (x_t, t), converted, so that a step is one of DDIM on a table of betas
    (alpha = sqrt(alphas_cumprod), linear in the angle between its entries) and one of Euler on a flow (alpha = 1 - s,
    sigma = s, s = t / T). The last step ends at the data: alpha = 1, sigma = 0, with r = 0.

    Its N steps begin at T - 1, T - 1 - T/N, ... (``trailing``), or at shift(1), shift((N - 1)/N), ... on a flow.
    ``pair`` holds the times (t, r) of the network's next call.

    Args:
        num_train_timesteps: T.
        beta_start: First beta of the model's noise schedule, as in its scheduler config.
        beta_end: Last beta.
        beta_schedule: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2``.
        trained_betas: The betas themselves, instead of the three above.
        rescale_betas_zero_snr: Whether the last alpha is 0.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample``, or ``flow`` (eps - x_0, without betas).
        shift: Resolution shift of the grid of a flow.
        use_flow_sigmas: Makes pipelines that compute times of their own leave them to the scheduler.
    """

    order = 1
    init_noise_sigma = 1.0
    _compatibles: ClassVar[list[str]] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        shift: float = 1.0,
        use_flow_sigmas: bool = True,
    ) -> None:
        self._flow = prediction_type == "flow"
        self._kind, self._T, self._shift = prediction_type, num_train_timesteps, shift
        if not self._flow:
            betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            self._angles = _angles(betas, zero_snr=rescale_betas_zero_snr)
        self._times: list[float] = []
        self.timesteps = torch.zeros(0)
        self._begin: int | None = None
        self._step: int | None = None

    # -- times -------------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the times: a number of steps, or falling times of the network, or (on a flow) falling sigmas.

        Sigmas are the network's own, already shifted, except 1, (N - 1)/N, ... 1/N: many pipelines pass these where
        none are named, for the scheduler to shift, so that they mean N steps. `mu`, a resolution shift that some
        pipelines pass to every scheduler, has no effect: ``shift`` is used.
        """
        if sigmas is not None:
            if not self._flow:
                raise ValueError("sigmas are for flow models; give timesteps")
            if _are_even(sigmas):
                num_inference_steps = len(sigmas)
            else:
                timesteps = [float(sigma) * self._T for sigma in sigmas]
        if timesteps is None:
            timesteps = self._even(num_inference_steps or 0)
        times = [float(time) for time in timesteps]
        if any(later >= earlier for earlier, later in pairwise(times)):
            raise ValueError(f"times must fall, these do not: {times}")
        if self._kind == "epsilon" and self._coefficients(times[0])[0] == 0:
            raise ValueError("an epsilon prediction says nothing of the data where alpha is 0; start below it")
        self._times = [*times, 0.0]
        self.num_inference_steps = len(times)
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        self._begin = self._step = None

    def _even(self, count: int) -> list[float]:
        if not 1 <= count <= self._T:
            raise ValueError(f"num_inference_steps = {count}: choose 1 to {self._T}")
        if not self._flow:
            return [round(self._T - i * self._T / count) - 1 for i in range(count)]
        edges = [1 - i / count for i in range(count)]
        return [self._T * self._shift * s / (1 + (self._shift - 1) * s) for s in edges]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the step that a pipeline begins with (image to image begins late); raise ValueError past the last."""
        count = len(self.timesteps)
        if begin_index and begin_index >= count:
            named = "sigmas" if self._flow else "timesteps"
            raise ValueError(
                f"none of the {count} steps is left to begin with: raise strength (to {1 / count:.3g} at least), take "
                f"more steps, or name the times that are left ({named}) and set strength to 1"
            )
        self._begin = begin_index

    def _index(self, timestep: Any = None) -> int:
        if self._step is None:
            if self._begin is None and timestep is not None:
                self._step = self.timesteps.tolist().index(float(timestep))
            else:
                self._step = self._begin or 0
        return self._step

    @property
    def pair(self) -> tuple[float, float]:
        """(t, r) of the step that comes next, in the network's time units; ValueError where none comes next."""
        index = self._index()
        if index >= len(self.timesteps):
            raise ValueError(
                "the network asks for its second time, but this scheduler has no step under way: attach belongs to the "
                "pipeline that is called (pipelines made of its parts by from_pipe share its scheduler, others do not)"
            )
        return self._times[index], self._times[index + 1]

    # -- the map -----------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample unchanged, and note which step this is."""
        self._index(timestep)
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return x_r from the network's output at (x_t, t), all of shape (B, ...); computed in at least fp32."""
        index = self._index(timestep)
        x_0, eps = self._parts(model_output, sample, *self._coefficients(self._times[index]))
        if index + 1 < self.num_inference_steps:
            alpha_r, sigma_r = self._coefficients(self._times[index + 1])
            x_r = alpha_r * x_0 + sigma_r * eps
        else:
            x_r = x_0
        self._step = index + 1
        x_r = x_r.to(sample.dtype)
        return SchedulerOutput(prev_sample=x_r) if return_dict else (x_r,)

    def _parts(self, output: Tensor, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """Return (x_0, eps), both of shape (B, ...)."""
        out = output.to(torch.promote_types(output.dtype, torch.float32))
        x = x_t.to(out.dtype)
        if self._kind == "epsilon":
            return (x - sigma * out) / alpha, out
        if self._kind == "v_prediction":
            return alpha * x - sigma * out, sigma * x + alpha * out
        if self._kind == "sample":
            return out, (x - alpha * out) / sigma
        return x - sigma * out, x + alpha * out  # flow: alpha + sigma = 1

    def _coefficients(self, t: float) -> tuple[float, float]:
        if self._flow:
            return 1 - t / self._T, t / self._T
        below = min(int(t), self._T - 2)
        low, high = self._angles[below : below + 2]
        angle = high if t == below + 1 else low + (t - below) * (high - low)
        # cos(pi/2) is 6e-17 in floating point
        return (0.0 if angle == math.pi / 2 else math.cos(angle)), math.sin(angle)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t of data and noise (B, ...) at times (B,), for pipelines that begin with an image."""
        pairs = [self._coefficients(float(t)) for t in timesteps.tolist()]
        both = torch.tensor(pairs, dtype=original_samples.dtype, device=original_samples.device)
        alpha, sigma = (part.reshape(-1, *[1] * (original_samples.ndim - 1)) for part in both.T)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return x_t as :meth:`add_noise` does, under the name and in the order that pipelines of flows call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self._T


def _are_even(sigmas: Sequence[float]) -> bool:
    count = len(sigmas)
    return all(abs(float(sigma) - (1 - i / count)) < 1e-6 for i, sigma in enumerate(sigmas))


def _betas(num: int, start: float, end: float, kind: str, trained: list[float] | None) -> Tensor:
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(start, end, num, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        edges = (torch.arange(num + 1, dtype=torch.float64) / num + 0.008) / 1.008 * math.pi / 2
        alpha_bar = edges.cos() ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule = {kind!r}: choose linear, scaled_linear or squaredcos_cap_v2")


def _angles(betas: Tensor, *, zero_snr: bool) -> list[float]:
    """Return theta_t with alpha_t = cos(theta_t) and sigma_t = sin(theta_t), for each timestep."""
    table = torch.cumprod(1 - betas, dim=0)
    if zero_snr:
        root = table.sqrt()
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return torch.atan2((1 - table).sqrt(), table.sqrt()).tolist()
