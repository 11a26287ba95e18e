"""A plugin file for tests: a method that needs no images. Loaded with --plugin."""

import distill
import torch


class Rehearsal(distill.Method):
    """On pure noise the student learns to say without guidance what its teacher says with it."""

    name = "rehearsal"

    class Config(distill.Method.Config):
        """Settings of the rehearsal."""

        guidance: float = 3.0
        """The teacher's guidance scale."""

    @classmethod
    def roles(cls, config, setup):
        return [distill.Role("teacher"), distill.Role("student", trains=setup.model_type)]

    @classmethod
    def requires(cls, config, setup):
        return distill.Requirements(images=False)

    def updates(self, context, batch, step):
        assert batch.latents is None
        x = context.rng.randn("noise", batch.latent_shape)
        grid = context.grid(10)
        t = grid.times[context.rng.integers("index", len(grid))]
        with torch.no_grad():
            scale = torch.full((len(batch),), self.config.guidance)
            target = context.predict_guided(x, t, batch.cond, scale).eps
        losses = (context.predict("student", x, t, batch.cond).eps - target).square().flatten(1).mean(1)
        yield distill.Update("student", losses.mean(), per_sample=losses.detach(), t=t)

    def sampler(self, schedule, *, num_inference_steps=None, guidance_scale=None):
        return distill.Sampler("DDIMScheduler", {}, num_inference_steps or 4, guidance_scale or 0.0)


@distill.hookimpl
def register_methods():
    return [Rehearsal]
