"""The method on a path that is known: a teacher whose velocity does not depend on where it is asked."""

from types import SimpleNamespace

import torch
from distill.core.diffusion import FlowSchedule, Prediction
from distill.core.plugin_api.method import MethodSetup
from distill_research.leap import Leap


class StraightContext:
    """A flow whose guided teacher always moves with the velocity 2; the student says `velocity`."""

    schedule, device = FlowSchedule(), "cpu"
    rng = SimpleNamespace(
        integers=lambda name, high: torch.arange(4) % high,
        randn=lambda name, shape: torch.ones(4, *shape),
    )

    def __init__(self, velocity):
        self.velocity = velocity

    def predict_guided(self, x_t, t, cond, scale):
        return Prediction(torch.full_like(x_t, 2.0), x_t, t, self.schedule, "flow")

    def predict(self, role, x_t, t, cond):
        return Prediction(torch.full_like(x_t, self.velocity), x_t, t, self.schedule, "flow")


def losses_of(velocity):
    batch = SimpleNamespace(latents=torch.zeros(4, 1, 2, 2), cond={})
    (update,) = Leap(Leap.Config(), MethodSetup("lora")).updates(StraightContext(velocity), batch, 0)
    return update.per_sample


def test_many_steps_along_a_straight_path_are_one():
    assert losses_of(2.0).max() < 1e-10


def test_another_velocity_is_wrong_by_its_square():
    """x0 = x_t - t v, so its error is t times that of v; the noisier half has the weight 1."""
    times = torch.tensor([1.0, 0.75, 0.5, 0.25])
    weight = ((1 - times) / times).square().clamp(min=1)
    torch.testing.assert_close(losses_of(3.0), (weight * times**2).to(torch.float32), rtol=1e-5, atol=0)
