"""A family whose teacher is known in closed form: data N(c, q^2) per prompt c, one number per sample.

The network is affine in (x, c) with a weight per grid time, which is just enough capacity for every consistency
function of this data; it starts as the perfect denoiser in whichever parametrisation it is wrapped.
"""

from __future__ import annotations

import torch
from distill.core.batch import Batch
from distill.core.family import Capabilities, ModelFamily, ModelSettings
from torch import Tensor, nn

Q = 0.5


class AffineNetwork(nn.Module):
    """output = (a_j x + b_j c) + (guidance is ignored), j the grid index of the time fed; float64."""

    def __init__(self, schedule, times: Tensor, kind: str) -> None:
        super().__init__()
        self.register_buffer("times", schedule.network_time(times).double())
        a, b = affine_of(kind, schedule, times.double())
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor, time: Tensor, mean: Tensor) -> Tensor:
        j = (time.double()[:, None] - self.times).abs().argmin(1)
        return self.a[j][:, None] * x + self.b[j][:, None] * mean


def affine_of(kind: str, schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of x and c in the perfect network's raw output: it is linear in both."""
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    a = raw_output(kind, schedule, one, t, zero)[:, 0]
    b = raw_output(kind, schedule, zero, t, one)[:, 0]
    return a, b


def denoise(schedule, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """D*(x, t) = m + a q^2 (x - a m) / (a^2 q^2 + s^2), for x and mean of shape (B, 1)."""
    a, s = schedule.coefficients(t, x)
    return mean + a * Q**2 * (x - a * mean) / (a**2 * Q**2 + s**2)


def raw_output(kind: str, schedule, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    a, s = schedule.coefficients(t, x)
    x_0 = denoise(schedule, x, t, mean)
    eps = s * (x - a * mean) / (a**2 * Q**2 + s**2)
    return {"sample": x_0, "epsilon": eps, "v_prediction": a * eps - s * x_0, "flow": eps - x_0}[kind]


class GaussianFamily(ModelFamily):
    """Prompts are numbers: the mean of the data. The unconditional mean is 0."""

    name = "gaussian"
    capabilities = Capabilities(guidance_embedding=True)
    lora_targets = ()

    def __init__(self, schedule, kind: str, times: Tensor) -> None:
        super().__init__(self.Config(), ModelSettings("closed form"))
        self._schedule, self._kind, self._times = schedule, kind, times

    def check_source(self):
        pass

    def fingerprint(self, part):
        return part

    @property
    def prediction_type(self):
        return self._kind

    @property
    def schedule(self):
        return self._schedule

    latent_channels = 1
    scale_factor = 1

    def encode_prompts(self, prompts):
        return {"mean": torch.tensor([[float(p)] for p in prompts], dtype=torch.float64)}

    def condition(self, embeds, micro):
        return embeds

    def uncond(self, cond):
        return {"mean": torch.zeros_like(cond["mean"])}

    def encode_images(self, pixels, generator=None):
        raise NotImplementedError

    def decode_latents(self, latents):
        return latents

    def release_encoders(self):
        pass

    def load_network(self):
        return AffineNetwork(self._schedule, self._times, self._kind)

    def attach_adapter(self, network, path, adapter):
        raise NotImplementedError

    def student_network(self, teacher, *, guidance_embedding, second_time=False):
        import copy

        return copy.deepcopy(teacher)

    def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):
        return network(x_t, time, cond["mean"])

    def generate(self, *args, **kwargs):
        raise NotImplementedError

    def export(self, *args, **kwargs):
        raise NotImplementedError

    def load_student(self, *args, **kwargs):
        raise NotImplementedError

    def usage_snippet(self, info):
        return ""


def gaussian_batch(step: int, size: int, *, mean: float) -> Batch:
    """Data N(mean, q^2) for the prompt `mean`."""
    g = torch.Generator().manual_seed(step)
    latents = mean + Q * torch.randn(size, 1, generator=g, dtype=torch.float64)
    cond = {"mean": torch.full((size, 1), mean, dtype=torch.float64)}
    return Batch(latents, cond, tuple(f"s{i}" for i in range(size)), tuple(range(size)))
