"""A family whose teacher is known in closed form: data N(c, q^2) for each prompt c, one number per sample, float64.

Guidance keeps it Gaussian: the teacher guided with scale g is that of N(g c, q^2). The affine network has a weight
per grid time, which is just enough capacity for every consistency function of this data; it starts as the perfect
denoiser of its prediction type.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..diffusion.schedule import Schedule
from ..plugin_api.batch import Batch, Conditioning
from ..plugin_api.family import Capabilities, MicroConditioning, ModelFamily, ModelSettings

Q = 0.5
"""Standard deviation of the data of a prompt."""


class AffineNetwork(nn.Module):
    """output = a_j x + b_j c (guidance is ignored), j the grid index of the time input; float64.

    Args:
        schedule: The noise schedule.
        times: Shape (J,), in the schedule's units.
        kind: Prediction type of the output.
    """

    times: Tensor

    def __init__(self, schedule: Schedule, times: Tensor, kind: str) -> None:
        super().__init__()
        self.register_buffer("times", schedule.network_time(times).double())
        a, b = affine_of(kind, schedule, times.double())
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor, time: Tensor, mean: Tensor) -> Tensor:
        """Return the output (B, 1) for x (B, 1), the network's time input (B,) and mean (B, 1)."""
        j = (time.double()[:, None] - self.times).abs().argmin(1)
        return self.a[j][:, None] * x + self.b[j][:, None] * mean


def affine_of(kind: str, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of x and c in the perfect network's raw output, (J,) each: it is linear in both."""
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    a = raw_output(kind, schedule, one, t, zero)[:, 0]
    b = raw_output(kind, schedule, zero, t, one)[:, 0]
    return a, b


def denoise(schedule: Schedule, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """Return the perfect denoiser's x_0, m + alpha_t q^2 (x - alpha_t m) / (alpha_t^2 q^2 + sigma_t^2).

    `x` and `mean` (m) have shape (B, 1), `t` (B,) is in the schedule's units.
    """
    a, s = schedule.coefficients(t, x)
    return mean + a * Q**2 * (x - a * mean) / (a**2 * Q**2 + s**2)


def raw_output(kind: str, schedule: Schedule, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """Return the perfect network's output (B, 1) for a prediction type."""
    a, s = schedule.coefficients(t, x)
    x_0 = denoise(schedule, x, t, mean)
    eps = s * (x - a * mean) / (a**2 * Q**2 + s**2)
    return {"sample": x_0, "epsilon": eps, "v_prediction": a * eps - s * x_0, "flow": eps - x_0}[kind]


def gaussian_map(schedule: Schedule, x: Tensor, t: Tensor, r: Tensor, mean: Tensor) -> Tensor:
    """Return the exact map of the teacher's ODE from t to r, (B,) each.

    The distance of `x` (B, 1) from the mean keeps its quantile.
    """
    (a, s), (a_r, s_r) = schedule.coefficients(t, x), schedule.coefficients(r, x)
    return a_r * mean + ((a_r**2 * Q**2 + s_r**2) / (a**2 * Q**2 + s**2)).sqrt() * (x - a * mean)


class GaussianFamily(ModelFamily):
    """Prompts are numbers: the mean of the data. The unconditional mean is 0. It makes and exports no images.

    Args:
        schedule: The noise schedule.
        kind: Prediction type of the networks.
        times: Times that networks are called at, in the schedule's units.
    """

    name = "gaussian"
    capabilities: ClassVar[Capabilities] = Capabilities(guidance_embedding=True)
    lora_targets: ClassVar[tuple[str, ...]] = ()
    latent_channels: Any = 1
    scale_factor: Any = 1

    def __init__(self, schedule: Schedule, kind: str, times: Tensor) -> None:
        super().__init__(self.Config(), ModelSettings("closed form"))
        self._schedule, self._kind, self._times = schedule, kind, times
        self.decoded = False

    def check_source(self) -> None:
        """Do nothing: there is no source."""

    def fingerprint(self, part: str) -> str:
        """Return the part's name."""
        return part

    @property
    def prediction_type(self) -> str:
        """The prediction type as given."""
        return self._kind

    @property
    def schedule(self) -> Schedule:
        """The schedule as given."""
        return self._schedule

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the prompts as numbers (B, 1)."""
        return {"mean": torch.tensor([[float(p)] for p in prompts], dtype=torch.float64)}

    def condition(self, embeds: Conditioning, micro: MicroConditioning) -> Conditioning:
        """Return the prompts alone."""
        return embeds

    def uncond(self, cond: Conditioning) -> Conditioning:
        """Return means of 0."""
        return {"mean": torch.zeros_like(cond["mean"])}

    def encode_images(self, pixels: Tensor, generator: Any = None) -> Tensor:
        """Raise NotImplementedError: there are no images."""
        raise NotImplementedError

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return the latents as they are."""
        return latents

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Return grey images of one pixel, (B, 3, 1, 1), whose value is the sample (B, 1)."""
        self.decoded = True
        return latents.reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1)

    def prompt_dimensions(self, network: nn.Module) -> dict[str, int]:
        """Return the one dimension of the prompt."""
        return {"mean": 1}

    def release_encoders(self) -> None:
        """Do nothing: there are no encoders."""

    def load_network(self) -> nn.Module:
        """Return the perfect network at the given times."""
        return AffineNetwork(self._schedule, self._times, self._kind)

    def attach_adapter(self, network: nn.Module, path: str, adapter: str) -> None:
        """Raise NotImplementedError: there are no adapters."""
        raise NotImplementedError

    def student_network(
        self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False, smaller: bool = False
    ) -> nn.Module:
        """Return a copy."""
        return copy.deepcopy(teacher)

    def predict(
        self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, *, guidance: Tensor | None = None,
        second_time: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the network's output, whatever the guidance."""
        return network(x_t, time, cond["mean"])

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raise NotImplementedError: there are no images."""
        raise NotImplementedError

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: there are no images."""
        raise NotImplementedError

    def load_student(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Raise NotImplementedError: there are no images."""
        raise NotImplementedError

    def usage_snippet(self, info: Any) -> str:
        """Return no code."""
        return ""


def gaussian_batch(step: int, size: int, *, mean: float) -> Batch:
    """Return data from N(mean, q^2) for the prompt `mean`."""
    g = torch.Generator().manual_seed(step)
    latents = mean + Q * torch.randn(size, 1, generator=g, dtype=torch.float64)
    cond = {"mean": torch.full((size, 1), mean, dtype=torch.float64)}
    return Batch(latents, cond, tuple(f"s{i}" for i in range(size)), tuple(range(size)))
