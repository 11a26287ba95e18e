"""A family for matching distributions: data N(c, q^2) in D dimensions, and networks that know a Gaussian at all times.

Prompts are numbers, as of :class:`GaussianFamily`. The network is the perfect denoiser of N(c + shift, width^2), both
of them weights, at every time; at the knots (the times a student is called at) an affine map is added to its x_0, so
that as a student it can make any Gaussian of its input. A fake score fits shift and width, and is then exact.
"""

from __future__ import annotations

import copy

import torch
from distill.core.diffusion import DDPMSchedule, FlowSchedule
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.plugin_api.batch import Batch
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import Capabilities
from distill.core.plugin_api.method import MethodSetup
from distill.core.testing.gaussian import GaussianFamily, Q
from distill.distill_methods.dmd2 import DMD2
from torch import Tensor, nn

MEAN = 0.6
SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES = {
    "eps": ("epsilon", DDPMSchedule.from_config(SDXL)),
    "v": ("v_prediction", DDPMSchedule.from_config({**SDXL, "rescale_betas_zero_snr": True})),
    "x0": ("sample", DDPMSchedule.from_config(SDXL)),
    "flow": ("flow", FlowSchedule(shift=3.0)),
}


class ScoreNetwork(nn.Module):
    """Raw output (B, D) at x (B, D), time as fed (B,), prompt (B, 1); float64."""

    def __init__(self, schedule, kind: str, knots: list[float]) -> None:
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.register_buffer("knots", torch.tensor(knots, dtype=torch.float64))
        zero = torch.zeros((), dtype=torch.float64)
        self.shift, self.log_width = nn.Parameter(zero.clone()), nn.Parameter((zero + Q).log())
        self.slope = nn.Parameter(torch.zeros(len(knots), dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(len(knots), dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, mean: Tensor) -> Tensor:
        t = time.double() / (self.schedule.num_train_timesteps if self.schedule.clean_at_zero else 1)
        a, s = self.schedule.coefficients(t, x)
        mean, width = mean + self.shift, self.log_width.exp()
        ahead = (x - a * mean) / (a**2 * width**2 + s**2)
        x_0, eps = mean + a * width**2 * ahead, s * ahead
        near = ((t[:, None] - self.knots).abs() < 1e-9).double()
        added = (near @ self.slope)[:, None] * x + (near @ self.offset)[:, None]
        x_0, eps = x_0 + added, eps - a / s.clamp(min=1e-6) * added
        return {"sample": x_0, "epsilon": eps, "v_prediction": a * eps - s * x_0, "flow": eps - x_0}[self.kind]


class ScoreFamily(GaussianFamily):
    """Features are the noised sample itself and a nonlinear function of it and of two weights."""

    name = "scores"
    capabilities = Capabilities(features=True)

    def __init__(self, schedule, kind: str, knots: list[float]) -> None:
        super().__init__(schedule, kind, torch.tensor(knots))
        self._knots = knots

    def load_network(self):
        return ScoreNetwork(self._schedule, self._kind, self._knots).requires_grad_(False)

    def student_network(self, teacher, *, guidance_embedding, second_time=False):
        return copy.deepcopy(teacher).requires_grad_(True)

    def features(self, network, x_t, time, cond, *, blocks="first_half"):
        plain = x_t.reshape(len(x_t), -1, 1, 1).expand(-1, -1, 2, 2)
        bent = torch.tanh(plain * network.log_width.exp() + network.shift + torch.arange(4).reshape(1, 1, 2, 2) / 4)
        return [torch.cat([plain, bent], 1)]

    def feature_channels(self, network, *, blocks="first_half"):
        return [2]


def score_batch(size: int, *, dims: int = 1, step: int | None = None, prompt: float = MEAN) -> Batch:
    """Prompts alone, or with images where `step` seeds them."""
    cond = {"mean": torch.full((size, 1), prompt, dtype=torch.float64)}
    latents = None
    if step is not None:
        g = torch.Generator().manual_seed(step)
        latents = prompt + Q * torch.randn(size, dims, generator=g, dtype=torch.float64)
    keys = tuple(f"s{i}" for i in range(size))
    return Batch(latents, cond, keys, tuple(range(size)), latent_shape=(dims,))


def score_setup(case: str, *, seed: int = 0, **config):
    """(method, networks, context) on the family of this case."""
    kind, schedule = CASES[case]
    method = DMD2(DMD2.Config(**config), MethodSetup("full", kind))
    family = ScoreFamily(schedule, kind, method._times(schedule, method.config.num_inference_steps))
    roles = method.roles(method.config, method.setup)
    networks = Networks(family, roles, lora=None, seed=seed, parameter_dtype=torch.float64)
    return method, networks, Context(Runtime(family, networks, seed=seed, device=torch.device("cpu")))


def make_loop(method, networks, context, *, rates, steps, max_grad_norm=0.0):
    """A loop with Adam for each trained role, its learning rate falling to 0 along a cosine."""
    decay = lambda s: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())  # noqa: E731
    optimizers = {}
    for role in networks.trained_roles():
        parameters = networks.parameters(role)
        adam = torch.optim.Adam(parameters, lr=rates[role], betas=(0.0, 0.99))
        optimizers[role] = RoleOptimizer(
            adam, parameters, learning_rate=rates[role], schedule=decay, max_grad_norm=max_grad_norm
        )
    return Loop(method, context, networks, optimizers, health=HealthMonitor(3))
