"""Training of a method on data that is known in closed form, by the engine's own loop with the method's stages."""

from __future__ import annotations

import copy
import math

import torch
from distill.core.context import Context, Runtime
from distill.core.diffusion import DDPMSchedule, FlowSchedule
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.lr import staged
from distill.core.engine.optimize import RoleOptimizer
from distill.core.method import MethodSetup
from distill.core.networks import Networks
from torch import nn

from .gaussian import AffineNetwork, GaussianFamily

SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = DDPMSchedule.from_config(SDXL)
ZERO_SNR = DDPMSchedule.from_config({**SDXL, "rescale_betas_zero_snr": True})
PATHS = {
    "eps": ("epsilon", TABLE),
    "v": ("v_prediction", TABLE),
    "v-zero-snr": ("v_prediction", ZERO_SNR),
    "x0": ("sample", TABLE),
    "flow": ("flow", FlowSchedule(shift=1.0)),
    "flow-shift": ("flow", FlowSchedule(shift=3.0)),
}
"""Kind of prediction and schedule by a short name."""


class ToldNetwork(AffineNetwork):
    """An affine network that also takes w: output = a_j x + (b_j + d_j w) c, d starting at zero."""

    def __init__(self, teacher: AffineNetwork) -> None:
        nn.Module.__init__(self)
        self.register_buffer("times", teacher.times.clone())
        self.a, self.b = (nn.Parameter(part.detach().clone()) for part in (teacher.a, teacher.b))
        self.d = nn.Parameter(torch.zeros_like(teacher.b))

    def told(self, x, time, mean, w):
        j = (time.double()[:, None] - self.times).abs().argmin(1)
        return self.a[j][:, None] * x + (self.b[j] + self.d[j] * w)[:, None] * mean


class GuidedFamily(GaussianFamily):
    """Gaussian data whose students can take w."""

    def student_network(self, teacher, *, guidance_embedding, second_time=False):
        return ToldNetwork(teacher) if guidance_embedding else copy.deepcopy(teacher).requires_grad_(True)

    def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):
        assert (guidance is not None) == isinstance(network, ToldNetwork), "told if and only if there is an input"
        if guidance is not None:
            return network.told(x_t, time, cond["mean"], guidance)
        return network(x_t, time, cond["mean"])


def train(method_class, config, family, batch_of, *, num_steps, lr, seed=0, setup=None):
    """(method, networks, context) after `num_steps` steps of full training; the teacher is bitwise what it was.

    Args:
        batch_of: Makes the batch of a step.
        lr: Of Adam; falls along a cosine to 0 in every stage that restarts it.
    """
    setup = setup or MethodSetup("full")
    method = method_class(config, setup)
    stages = method.stages(config, total_steps=num_steps)
    networks = Networks(family, method.roles(config, setup), lora=None, seed=seed, parameter_dtype=torch.float64)
    before = {name: value.clone() for name, value in networks.base.state_dict().items()}
    context = Context(Runtime(family, networks, seed=seed, device=torch.device("cpu"), stages=stages))
    parameters = networks.parameters("student")
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    schedule = staged(lambda length: lambda step: 0.5 * (1 + math.cos(math.pi * step / length)), stages)
    optimizer = RoleOptimizer(adam, parameters, learning_rate=lr, schedule=schedule, max_grad_norm=0)
    loop = Loop(method, context, networks, {"student": optimizer}, health=HealthMonitor(1), stages=stages)
    for step in range(num_steps):
        loop.step(step, [batch_of(step)])
    for name, value in networks.base.state_dict().items():
        assert torch.equal(value, before[name]), "the teacher has changed"
    return method, networks, context
