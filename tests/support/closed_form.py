"""A Gaussian family whose students can be told the guidance."""

from __future__ import annotations

import copy

import torch
from distill.core.testing.gaussian import AffineNetwork, GaussianFamily
from torch import nn


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
