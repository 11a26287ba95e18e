"""Methods of a third party for recipes: one with a network and a turn of its own, one with stages. Loaded by file."""

import distill
import torch
from pydantic import Field


def at_half_noise(context, batch):
    """(x_t, t) of the batch in the middle of the schedule."""
    x_0 = batch.latents
    grid = context.grid(4)
    t = grid.times[2:3].expand(len(batch))
    eps = context.rng.randn("noise", x_0.shape[1:]).to(x_0.dtype)
    return context.schedule.add_noise(x_0, eps, t), t


class Turns(distill.Method):
    """A critic that is stepped first and always, a student every `every`-th step, a second critic's update last."""

    name = "turns"
    aliases = ("in-turns",)

    class Config(distill.Method.Config):
        """Settings of the method with turns."""

        every: int = Field(2, ge=1)
        """Steps of which the student takes one."""
        value: float = Field(1.0, ge=0)
        """What the student is to say, in latent units."""
        critic: str = "critic"
        """Name of its network."""
        student_learning_rate: float | None = Field(None, gt=0)
        """Learning rate of the student."""

    @classmethod
    def roles(cls, config, setup):
        return [
            distill.Role("teacher"),
            distill.Role("student", trains=setup.model_type, learning_rate=config.student_learning_rate),
            distill.Role(config.critic, trains=setup.model_type),
        ]

    @classmethod
    def requires(cls, config, setup):
        return distill.Requirements(divides_timesteps=40, zero_dropout=True)

    def __init__(self, config, setup):
        super().__init__(config, setup)
        self.steps = torch.zeros((), dtype=torch.int64)

    def updates(self, context, batch, step):
        x_t, t = at_half_noise(context, batch)
        yield self._update(self.config.critic, context, batch, x_t, t, 3.0)
        if (step + 1) % self.config.every == 0:
            yield self._update("student", context, batch, x_t, t, self.config.value)
            yield self._update(self.config.critic, context, batch, x_t, t, 4.0)
        self.steps += 1

    def _update(self, role, context, batch, x_t, t, value):
        losses = (context.predict(role, x_t, t, batch.cond).x0 - value).square().flatten(1).mean(1)
        return distill.Update(role, losses.mean(), {"seen": losses.detach().mean()}, per_sample=losses.detach(), t=t)

    def sampler(self, schedule, *, num_inference_steps=None, guidance_scale=None):
        return distill.Sampler("DDIMScheduler", {}, num_inference_steps or 7, guidance_scale or 0.0)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"].clone()


class Halves(Turns):
    """The same in two stages, and with nothing but a student."""

    name = "halves"
    aliases = ()

    @classmethod
    def roles(cls, config, setup):
        return [distill.Role("teacher"), distill.Role("student", trains=setup.model_type)]

    @classmethod
    def stages(cls, config, *, total_steps):
        half = total_steps // 2
        later = distill.Stage("second", total_steps - half, reset=("student",))
        return [distill.Stage("first", half), later]

    def updates(self, context, batch, step):
        x_t, t = at_half_noise(context, batch)
        value = self.config.value + context.stage.index
        yield self._update("student", context, batch, x_t, t, value)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state


@distill.hookimpl
def register_methods():
    return [Turns, Halves]
